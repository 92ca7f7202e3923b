"""The entry point of `python -m diffusify` and `torchrun -m diffusify`."""

from diffusify.cli import app

if __name__ == "__main__":
    app()
