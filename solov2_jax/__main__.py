"""`python -m solov2_jax COMMAND`: the command `solov2`."""

from solov2_jax.tools.cli.solov2 import main

if __name__ == "__main__":
    main()
