"""`llamapro convert` under its old name."""

import _package

if __name__ == "__main__":
    _package.run("convert")
