"""Trains SOLOv2, or resumes: `solov2 train` from the sources; see --help."""

from solov2_jax.tools.cli.train import run

if __name__ == "__main__":
    run()
