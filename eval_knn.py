"""Judge an encoder by its nearest neighbours:  python eval_knn.py --checkpoint ANY"""

from moco.command import cli
from moco.command.knn import main

if __name__ == "__main__":
    cli.run_main(main)
