"""Judge an encoder by a classifier on top of it:  python eval_linear.py --checkpoint ANY"""

from moco.command import cli
from moco.command.linear import main

if __name__ == "__main__":
    cli.run_main(main)
