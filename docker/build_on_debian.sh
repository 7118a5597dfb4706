#!/usr/bin/env bash
# Builds docker/Dockerfile on a small Debian with torch, which it makes, and runs the smoke test inside without a network.
#
#   docker/build_on_debian.sh
#
# Needs root, Debian's buildah, mmdebstrap and iproute2, and 7 GB under TMPDIR; keeps nothing. Containers are plain
# chroots, so that it also works inside a container. Packages are fetched outside of them, with this machine's apt and
# pip; exit code 75 means that a package could not be fetched.
set -euo pipefail
cd "$(dirname "$0")/.."

SUITE=bookworm
PYTHON_VERSION=3.11 # the suite's
# Not the numpy of requirements.txt: the image must keep the base's.
BASE_PACKAGES=(torch==2.13.0 numpy==2.2.5 setuptools==84.2.1)

WORK=$(mktemp -d "${TMPDIR:-/var/tmp}/llamapro-image.XXXXXX")
trap 'rm -rf --one-file-system "$WORK"' EXIT
trap 'exit 143' INT TERM # bash waits for the running command first, so nothing is written during rm
chmod 755 "$WORK"        # apt downloads as its own user
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
# A network of its own: no ports are shared with other programs, and nothing is fetched.
unshare --net bash -c 'ip link set lo up && exec "$@"' - "${run[@]}" bash -euo pipefail -c '
  id
  (cd / && python3 -m pip list --format freeze | grep -E "^(torch|numpy|megatron-llamapro)==")
  examples/smoke/run.sh'
