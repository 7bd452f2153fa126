"""The examples run, shortened, as they stand."""

import runpy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_pictures
from processes import ROOT, start

EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.usefixtures("in_tmp")


def run(name, **arguments):
    return runpy.run_path(str(EXAMPLES / name))["main"](**arguments)


def test_bands():
    trained = run("bands.py", epochs=1)
    assert trained.encoder(torch.zeros(1, 16, 32, 32)).shape[0] == 1


def test_own_backbone():
    program = torch.export.load(run("own_backbone.py", epochs=1)).module()
    assert program(torch.zeros(3, 1, 16, 16)).shape == (3, 64)


def test_targets(tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(120, 8)).astype("float32")
    paths = [f"{n}.png" for n in range(120)]
    (tmp_path / "features").mkdir()
    features = pd.DataFrame({"path": paths, "vector": [*vectors]})
    features.to_parquet(tmp_path / "features" / "features.parquet")
    told = pd.DataFrame({"path": paths[::-1], "group": rng.integers(0, 30, 120)})
    told["label"] = (vectors[::-1, 0] > 0).astype(int)
    told["noise"] = rng.permutation(told["label"])
    told["number"] = 100 * vectors[::-1, 1] + 7
    told.loc[:9, "label"] = np.nan
    told.to_csv(tmp_path / "table.csv", index=False)
    scores = run("targets.py", features="features", table="table.csv").set_index("target")
    assert scores["images"].to_dict() == {"label": 110, "noise": 120, "number": 120}
    assert scores.loc["label", "area under ROC"] > 97 and scores.loc["number", "R2"] > 0.99
    assert 25 < scores.loc["noise", "area under ROC"] < 75
    frames = pd.DataFrame({"path": ["other.png"], "label": [1]})
    frames.to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(SystemExit, match="no path of other.csv is in features"):
        run("targets.py", features="features", table="other.csv")


def test_plain_trainer():
    last = run("plain_trainer.py", epochs=1)
    assert torch.load(last, weights_only=True)["global_step"] == 19
    run("plain_trainer.py", epochs=2)
    assert torch.load(last, weights_only=True)["global_step"] == 38


async def fork_kernel(self, cmd, **options):
    """Start a notebook's kernel as a fork of a process that has imported the libraries."""
    words, script = cmd[cmd.index("-f") :], Path(find_spec("ipykernel_launcher").origin)
    self.process = start(*words, script=script, cwd=Path(options["cwd"]))
    self.process.stdin = self.process.stdout = self.process.stderr = None
    self.pid = self.pgid = self.process.pid
    return self.connection_info


def test_notebook(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from jupyter_client.provisioning import LocalProvisioner

    monkeypatch.setattr(LocalProvisioner, "launch_kernel", fork_kernel)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("a", "b"):
            write_pictures(
                tmp_path / "photographs" / split / kind, [f"{i}.png" for i in range(20)], rng
            )
    monkeypatch.setenv("MINUTES", "0.01")
    monkeypatch.setenv("EPOCHS", "1")
    notebook = nbformat.read(EXAMPLES / "photographs.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    result = notebook.cells[-1].outputs[-1]["data"]["text/plain"]
    assert "kNN" in result and "fine-tuned" in result


def test_every_example_has_its_test():
    names = {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert names == {"bands", "own_backbone", "plain_trainer", "photographs", "targets"}
