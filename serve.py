"""Serves predictions over HTTP: `solov2 serve` from the sources; see --help."""

from solov2_jax.tools.cli.serve import run

if __name__ == "__main__":
    run()
