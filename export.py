"""Write a backbone in another layout:  python export.py --checkpoint ANY --format F --output P"""

from moco.command import cli
from moco.command.export import main

if __name__ == "__main__":
    cli.run_main(main)
