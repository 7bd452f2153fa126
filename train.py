"""Pretrain an encoder without labels:  python train.py --config configs/quickstart.yaml"""

from moco.command import cli
from moco.command.train import main

if __name__ == "__main__":
    cli.run_main(main)
