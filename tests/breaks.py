"""Break the code on purpose, one place at a time: each break must make a test of its room fail.

    python tests/breaks.py [WORDS]        only breaks whose file or text holds one of the words

Works on a copy. A break that no test notices, or whose text is not there any more, is an error.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 900  # a break may make a test wait for ever
STEP = "tests/algorithm/test_pretrain.py"
COMPILED = "tests/algorithm/test_compiled.py"
CONTRAST = "tests/algorithm/test_contrast.py"
OPTIM = "tests/algorithm/test_optim.py"
MUON = "tests/algorithm/test_muon.py"
NORMS = "tests/algorithm/test_batch_norm.py"
RANKS = "tests/test_distributed.py"
VIEWS = "tests/images"
KNN = "tests/evaluation/test_knn.py"
V3 = "tests/algorithm/test_v3.py"
FAST = "tests/algorithm/test_fast_moco.py"
AUTO = "tests/training/test_autoconfigure.py"
RUN = "tests/training/test_run.py"
EXTEND = "tests/training/test_extend.py"
CLOCK = "tests/training/test_clock.py"
GROWTH = "tests/images/test_growth.py"
FREEZE = "tests/training/test_continue.py"
REFERENCES = "tests/evaluation/test_references.py"
VERDICT = "tests/evaluation/test_verdict.py"
GRAPH = "tests/training/test_one_graph.py"
RESUME = "tests/training/test_resume.py"
RESUMING = "tests/training/test_resuming.py"
STREAMS = "tests/images/test_streams.py"
SHARDS = "tests/images/test_shards.py"
STORES = "tests/images/test_stores.py"
TABLES = "tests/images/test_tables.py"
LOADER = "tests/images/test_loader.py"
EMBED = "tests/reports/test_embed_parts.py"
QUALITY = "tests/training/test_quality.py"
JUDGED = "tests/command/test_eval_scripts.py"
PARTS = "tests/command/test_own_parts.py"

# (file below moco/, text that stands there once, what it becomes, tests that must notice)
BREAKS = [
    # the step
    (
        "algorithm/pretrain.py",
        "copy.deepcopy(encoder).requires_grad_(False)",
        "copy.deepcopy(encoder)",
        STEP,
    ),
    ("algorithm/pretrain.py", "1 - momentum", "momentum", STEP),
    ("algorithm/pretrain.py", "self.share.fill_(self.key_share())", "pass", GRAPH),
    ("training/captured.py", "rate.fill_(number)", "rate", GRAPH),
    ("training/captured.py", "module.optimizer_zero_grad = ", "module.nothing = ", GRAPH),
    ("algorithm/pretrain.py", "if batch_idx % self.accumulate == 0:", "if True:", STEP),
    ("algorithm/pretrain.py", "own = local_rows(key, count)", "own = key[:count]", STEP),
    (
        "algorithm/pretrain.py",
        "zip(keys, cycle(self.queues), strict=False)",
        "zip(keys[:1], cycle(self.queues), strict=False)",
        STEP,
    ),
    ("algorithm/pretrain.py", '0.5 if model_config.symmetric == "mean" else 1.0', "1.0", STEP),
    (
        "algorithm/pretrain.py",
        "restore(normalize(at_least_fp32(keys)), key_order)",
        "restore(at_least_fp32(keys), key_order)",
        STEP,
    ),
    ("algorithm/pretrain.py", "2 * model_config.temperature", "model_config.temperature", V3),
    ("algorithm/patches.py", "combinations(range(patches), combine)", "[(0, 1)]", FAST),
    ("algorithm/encoder.py", "bias=affine", "bias=False", FAST),
    ("algorithm/pretrain.py", 'if group.get("constant") else rate', "if False else rate", FAST),
    ("algorithm/contrast.py", "own.repeat_interleave(several, 0)", "own.repeat(several, 1)", FAST),
    ("algorithm/pretrain.py", "self.query_encoder.parameters(), ", "self.parameters(), ", V3),
    # loss and queue
    ("algorithm/contrast.py", "dim=1) / temperature", "dim=1) * temperature", CONTRAST),
    (
        "algorithm/contrast.py",
        "torch.cat([positive, negative], dim=1)",
        "torch.cat([negative, positive], dim=1)",
        CONTRAST,
    ),
    (
        "algorithm/contrast.py",
        "torch.autocast(query.device.type, enabled=False)",
        "torch.autocast(query.device.type, enabled=True)",
        CONTRAST,
    ),
    ("algorithm/contrast.py", "(rank < 5)", "(rank < 6)", CONTRAST),
    ("algorithm/contrast.py", "else self.keys.clone()", "else self.keys", CONTRAST),
    (
        "algorithm/contrast.py",
        "self.num_enqueued.add_(count)",
        "self.num_enqueued.add_(count + 1)",
        CONTRAST,
    ),
    ("algorithm/contrast.py", "if count > size:", "if count > size + 1:", CONTRAST),
    # shuffle and ranks
    ("distributed.py", "return order.transpose(0, 1).flatten()", "return order.flatten()", RANKS),
    (
        "distributed.py",
        "restored[order.to(keys.device)] = gathered",
        "restored = gathered[order.to(keys.device)]",
        RANKS,
    ),
    ("distributed.py", "senders + step * world", "senders + step", RANKS),
    ("distributed.py", "padded[: len(rows)] = rows", "padded[-len(rows) :] = rows", RANKS),
    # schedules
    (
        "algorithm/optim.py",
        "(config.lr - start) * (step - frozen) / (warmup - frozen)",
        "(config.lr - start) * (step + 1 - frozen) / (warmup - frozen)",
        OPTIM,
    ),
    (
        "algorithm/optim.py",
        "(step - warmup) / max(total_steps - warmup, 1)",
        "step / max(total_steps, 1)",
        OPTIM,
    ),
    ("algorithm/optim.py", "bisect_right(", "bisect_left(", OPTIM),
    (
        "algorithm/optim.py",
        "return end - (end - start) * 0.5",
        "return start + (end - start) * 0.5",
        OPTIM,
    ),
    ("algorithm/optim.py", 'mode="min" if', 'mode="max" if', OPTIM),
    # BatchNorm
    ("algorithm/batch_norm.py", "variances.mean(0)", "variances[0]", NORMS),
    ("algorithm/batch_norm.py", "count / (count - 1)", "1.0", NORMS),
    # draws and views
    (
        "images/draws.py",
        "(recipe.crop_min + (1 - recipe.crop_min) * u[:, :_ATTEMPTS])",
        "u[:, :_ATTEMPTS]",
        VIEWS,
    ),
    (
        "images/draws.py",
        "2 * u[:, _ATTEMPTS : 2 * _ATTEMPTS] - 1",
        "u[:, _ATTEMPTS : 2 * _ATTEMPTS]",
        VIEWS,
    ),
    ("images/draws.py", "blur=u[:, 10] < recipe.blur", "blur=u[:, 9] < recipe.blur", VIEWS),
    ("images/draws.py", "grey=u[:, 9] < recipe.grey", "grey=u[:, 9] > recipe.grey", VIEWS),
    ("algorithm/folded_stem.py", "(1, 0, 1, 0)", "(0, 1, 0, 1)", COMPILED),
    ("images/crops.py", "columns.flip(1)", "columns.flip(2)", VIEWS),
    ("images/crops.py", "scale.clamp(min=1)", "scale", VIEWS),
    ("images/crops.py", "return part.flip(2) if flip else part", "return part", VIEWS),
    ("images/views.py", "(0.2989, 0.587, 0.114)", "(0.3333, 0.3333, 0.3333)", VIEWS),
    ("images/views.py", "grey, mean) * (1 - factor)", "grey, mean) * factor", VIEWS),
    # order
    (
        "images/steps.py",
        "order[number * size : (number + 1) * size]",
        "order[(number + 1) * size - size : number * size + size].flip(0)",
        VIEWS,
    ),
    (
        "images/steps.py",
        "divmod(self.position(), len(self))",
        "(self.position() // len(self), 0)",
        RUN,
    ),
    (
        "images/loader.py",
        "index, crops, 1 - n) for n in numbers",
        "index, crops, n) for n in numbers",
        VIEWS,
    ),
    # kNN
    ("evaluation/knn.py", "/ temperature).exp()", "* temperature).exp()", KNN),
    (
        "evaluation/knn.py",
        "votes.scatter_add(1, classes[:, done:k], weight[:, done:k])",
        "votes.scatter_add(1, classes[:, done:k], torch.ones_like(weight[:, done:k]))",
        KNN,
    ),
    ("images/loader.py", "+ number // self.accumulate)", "+ number)", GROWTH),
    ("images/growth.py", "bisect_right(self.starts, step)", "len(self.sizes)", GROWTH),
    ("images/growth.py", "(size / self.sizes[-1]) ** 2", "size / self.sizes[-1]", GROWTH),
    # resuming and saving
    ("algorithm/pretrain.py", 'self.plateau.load_state_dict(checkpoint["plateau"])', "pass", RUN),
    (
        "whole_files.py",
        'path.with_name(f".{path.name[:60]}.{os.getpid()}.tmp")',
        "path",
        "tests/test_whole_files.py",
    ),
    ("algorithm/muon.py", "factor @ gram @ factor", "factor @ gram", MUON),
    ("algorithm/muon.py", "steps <= len(coefficients)", "True", MUON),
    (
        "reports/parts.py",
        "    if not goes_on:",
        "    if True:",
        "tests/reports/test_embed_parts.py",
    ),
    (
        "command/early.py",
        "path.suffix.lower() not in endings",
        "False",
        "tests/reports/test_select.py",
    ),
    ("training/stored.py", "left | decided.settings", "decided.settings", RESUMING),
    (
        "training/writing.py",
        "torch.load(path, map_location=map_location, weights_only=True)",
        "torch.load(path, map_location=map_location, weights_only=weights_only)",
        RUN,
    ),
    ("training/stored.py", 'checkpoints" / BEFORE_DECAY', 'checkpoints" / "last.ckpt"', EXTEND),
    ("algorithm/optim.py", "(total_steps - start), 1.0)", "(total_steps - start), 2.0)", EXTEND),
    ("training/clock.py", "distributed.rank() == 0 and self", "self", CLOCK),
    ("training/clock.py", "return self._before + ", "return ", CLOCK),
    ("algorithm/pretrain.py", "parameter.grad = None", "parameter.grad.zero_()", FREEZE),
    # decisions and verdict
    ("training/autoconfigure.py", "* keys // 8", "* keys // 2", AUTO),
    ("training/autoconfigure.py", "if sum(asked.values()) <= epochs", "if True", AUTO),
    ("training/stored.py", "kept[name] = value", "pass", AUTO),
    ("evaluation/verdict.py", "drawn_variance * (1 + 1 / len(hits))", "0", VERDICT),
    ("evaluation/verdict.py", "<= FACTOR * self.ahead_error", "<= self.ahead_error", VERDICT),
    ("evaluation/verdict.py", "(0.025, 0.975)", "(0.05, 0.95)", REFERENCES),
    ("evaluation/references.py", "repr(tuple(image.shape)).encode()", "bytes()", REFERENCES),
    ("run_directory.py", "archive.testzip() is None", "True", "tests/test_run_directory.py"),
    # shards
    ("images/streams.py", "places - line.begin[piece]", "0 * places", STREAMS),
    ("images/streams.py", "(begin[drawn] - cuts[0])", "begin[drawn]", STREAMS),
    ("images/cache.py", "fcntl.LOCK_EX", "fcntl.LOCK_SH", STORES),
    ("images/cache.py", "uses[path] <= after", "uses[path] < 0", STORES),
    ("images/stores.py", "if found != facts", "if found.size != facts.size", STORES),
    ("images/shards.py", "len(content) < size", "not content", SHARDS),
    (
        "images/shards.py",
        "if not shard.is_cached:\n            found",
        "if 0:\n            found",
        SHARDS,
    ),
    ("images/shards.py", "check_unchanged(*self.shards[number])", "None", STORES),
    ("images/stores.py", "file_system(address)[0].invalidate_cache()", "pass", STORES),
    ("images/shard_index.py", "text.encode(), self.starts", "text.encode()", SHARDS),
    ("images/packing.py", "[images[row] for row in", "images or [images[row] for row in", SHARDS),
    ("images/cache.py", "if not self._has_whole(shard):", "if not path.exists():", STORES),
    ("images/tables.py", "if not name or not (own or word):", "if not (name and own):", TABLES),
    ("images/tables.py", "if has_labels[word]), found[0]", "if word), found[0]", TABLES),
    ("images/labelled.py", "self.images.bad.agree()", "None", LOADER),
    ("reports/parts.py", "images.bad.agree()", "None", EMBED),
    ("training/build.py", "with distributed.together():  # the", "if True:  # the", QUALITY),
    ("training/clock.py", "late and step > self._marks[0][0]", "late", CLOCK),
    ("checks.py", 'if rest and "@" in rest', 'if "" and "@" in rest', STORES),
    ("algorithm/batch_norm.py", "if isinstance(child, nn.SyncBatchNorm):", "if 0:", NORMS),
    ("algorithm/pretrain.py", "own = sums[rank()] if", "own = sums[0] if", RESUME),
    ("command/judge.py", "LISTS if is_moved else ()", "()", JUDGED),
    ("training/decide.py", "if before.pairs not in", "if decided.pairs not in", PARTS),
    ("training/replay.py", "if decided.is_open:  # the rate", "if 0:  # the rate", CLOCK),
    ("training/saving.py", "[BEST] if self.quality.is_best", "[BEST] if 0", QUALITY),
]


def main(words: list[str]) -> int:
    """Try the breaks; return 1 when one went unnoticed."""
    chosen = [b for b in BREAKS if not words or any(w in " ".join(b) for w in words)]
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(
            ".venv*", ".git", "runs", "results", "*_cache", "__pycache__"
        )
        shutil.copytree(ROOT, copy, ignore=ignored)
        for number, (name, before, after, tests) in enumerate(chosen, 1):
            path = copy / "moco" / name
            text = path.read_text(encoding="utf-8")
            if text.count(before) != 1:
                missed.append(f"{name}: {before!r} stands there {text.count(before)} times")
                continue
            path.write_text(text.replace(before, after), encoding="utf-8")
            start = time.monotonic()
            noticed = is_noticed(copy, tests.split())
            path.write_text(text, encoding="utf-8")
            print(
                f"{number}/{len(chosen)} {name}: {after.splitlines()[0][:60]}: "
                f"{noticed or 'NOT NOTICED'} ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
            if not noticed:
                missed.append(f"{name}: {before!r} -> {after!r}")
    print(
        "\n".join(
            ["", f"{len(chosen) - len(missed)} of {len(chosen)} breaks were noticed", *missed]
        )
    )
    return 1 if missed else 0


def is_noticed(copy: Path, tests: list[str]) -> str:
    """Run tests until one fails; return its name, or nothing."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return "the tests hang"
    if done.returncode not in (1, 2):
        return ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0].removeprefix("FAILED ") if lines else "ended badly"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
