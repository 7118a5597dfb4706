"""Builds the real image on a small Debian with torch, and runs the smoke test inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile

import pytest

NOT_FETCHED = 75


def why_not() -> str | None:
    """Return why no image can be built here, or None."""
    missing = [name for name in ("buildah", "mmdebstrap", "unshare", "ip") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: buildah, mmdebstrap, util-linux, iproute2)"
    if os.geteuid() != 0:
        return "chroots need root"
    if shutil.disk_usage(tempfile.gettempdir()).free < 8e9:
        return f"less than 8 GB are free in {tempfile.gettempdir()}"
    probe = subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, text=True)
    return f"no namespaces: {probe.stderr.strip()}" if probe.returncode else None


@pytest.mark.container
@pytest.mark.timeout(1200)
def test_the_smoke_test_passes_inside() -> None:
    """As the image's user, with the base's own torch and numpy, although requirements.txt pins other versions."""
    if reason := why_not():
        pytest.skip(f"no image can be built here: {reason}")
    here = {**os.environ, "TMPDIR": tempfile.gettempdir()}
    done = subprocess.run(["docker/build_on_debian.sh"], capture_output=True, text=True, env=here)
    if done.returncode == NOT_FETCHED:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "uid=10001(llamapro)" in done.stdout and "torch==2.13.0" in done.stdout and "numpy==2.2.5" in done.stdout
    assert done.stdout.endswith("smoke: all steps passed\n")
