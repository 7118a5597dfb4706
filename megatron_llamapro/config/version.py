"""The version of this package, for its manifests and journals. pyproject.toml reads it from this file."""

VERSION = "0.1.0"
