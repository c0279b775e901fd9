"""Run the command ``spectrim`` as ``python -m spectrim``."""

from spectrim.cli.commands import compress

if __name__ == "__main__":
    compress()
