#!/usr/bin/env bash
# Builds docker/Dockerfile on a small Debian with torch, made here, and runs the smoke test inside, without a network.
#
#   docker/build_on_debian.sh
#
# Needs root, Debian's buildah, mmdebstrap and iproute2, and 7 GB under TMPDIR; nothing is kept. Containers are plain chroots,
# so that it works inside a container too. What they install is fetched outside, by apt and pip as they are set up here;
# exit code 75 says that it could not be had.
set -euo pipefail
cd "$(dirname "$0")/.."

SUITE=bookworm
PYTHON_VERSION=3.11 # the suite's
# numpy is not the one of requirements.txt: the base's must stay.
BASE_PACKAGES=(torch==2.13.0 numpy==2.2.5 setuptools==84.2.1)

WORK=$(mktemp -d "${TMPDIR:-/var/tmp}/llamapro-image.XXXXXX")
trap 'rm -rf --one-file-system "$WORK"' EXIT
trap 'exit 143' INT TERM # once the command that runs has ended, so that nothing is written behind rm's back
chmod 755 "$WORK"        # apt downloads as a user of its own
export TMPDIR="$WORK"

say() { echo "[$(date +%T)] $*"; }
not_had() {
  say "could not be fetched: $*"
  exit 75
}
fetch() {
  python3 -m pip download --quiet --dest "$WORK/wheels" --python-version "$PYTHON_VERSION" --only-binary :all: "$@" ||
    not_had "$*"
}
BUILDAH=(buildah --root "$WORK/store" --runroot "$WORK/run" --storage-driver vfs)
build() { "${BUILDAH[@]}" bud --quiet --format docker --isolation chroot --volume "$WORK/wheels:/wheels:ro" "$@"; }

say "fetch wheels"
fetch "${BASE_PACKAGES[@]}"
fetch --requirement requirements.txt

say "make a small Debian"
mmdebstrap --quiet --variant=apt --include=python3,python3-pip,python-is-python3 "$SUITE" "$WORK/debian.tar" ||
  not_had "Debian $SUITE"

say "build the base: ${BASE_PACKAGES[*]}"
build --tag base --file - "$WORK" <<DOCKERFILE
FROM scratch
ADD debian.tar /
ENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m pip install --quiet --no-cache-dir ${BASE_PACKAGES[*]}
DOCKERFILE

say "build the image"
build --tag megatron-llamapro --build-arg BASE_IMAGE=localhost/base --file docker/Dockerfile .

say "run the smoke test inside"
container=$("${BUILDAH[@]}" from localhost/megatron-llamapro)
run=("${BUILDAH[@]}" run --isolation chroot --hostname localhost "$container" --)
# A network of its own: ports are not shared with what else runs here, and nothing is fetched.
unshare --net bash -c 'ip link set lo up && exec "$@"' - "${run[@]}" bash -euo pipefail -c '
  id
  (cd / && python3 -m pip list --format freeze | grep -E "^(torch|numpy|megatron-llamapro)==")
  examples/smoke/run.sh'
