"""`python -m diffusify`, and so `torchrun -m diffusify`."""

from diffusify.cli import app

if __name__ == "__main__":
    app()
