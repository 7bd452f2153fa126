"""Start a run from any checkpoint: fill fresh encoders, heads, predictor and queues (--init_from).

It reads and translates a file as `load` does. Shapes: K queue, C embedding.
"""

from __future__ import annotations

from pathlib import Path

from timm.models import adapt_input_conv
from torch import nn

from moco.algorithm.names import is_own
from moco.checkpoints.architecture import attention_heads, is_named, look, named_heads
from moco.checkpoints.layouts import Contents, read_contents
from moco.checkpoints.matching import ABSENT, State, groups, match_state, shape_text, take
from moco.checkpoints.origin import translated
from moco.checkpoints.read import tensors_beside
from moco.checkpoints.shapes import fixed_positions
from moco.config import ModelConfig, UserError

# Layouts whose checkpoints hold heads and a queue as ours do.
_WITH_HEADS = ("moco", "official", "official-v3", "openselfsup", "mmpretrain")


def restore_pretraining(
    path: str | Path,
    module_state: State,
    backbone: nn.Module | None = None,
    allow_partial: bool = False,
    own: bool = False,
) -> tuple[State, str]:
    """Fill a fresh MoCo module's state dict with everything in a file that fits.

    A checkpoint of ours, of the official code, OpenSelfSup or mmpretrain gives both encoders and,
    where their shapes agree, the heads and the queue. Another layout gives its backbone to both.
    The rest stays fresh.

    Args:
        path: As for `moco.checkpoints.load.load_encoder`.
        module_state: State dict of a module just built; it is not changed.
        backbone: Its backbone. A ViT's positions and the RGB weights of a first convolution are
            fitted to it.
        allow_partial: Accept a file that fits only in part, or whose network a run cannot build.
        own: The backbone is a module of the user's own.

    Returns:
        The filled state dict, and one line that says what came from the file and what did not.

    Raises:
        UserError: As for `load_encoder`.
    """
    contents = read_contents(path, backbone if own else None)
    notes = [_refuse_variant(contents, backbone, allow_partial)]
    both = contents.layout in _WITH_HEADS
    both = both and bool(contents.take("key_encoder.backbone."))
    state = dict(module_state)
    for side in ("query", "key"):
        prefix = f"{side}_encoder.backbone."
        part, adapted = _to_channels(contents.backbone(side if both else "query"), backbone)
        found = match_state(take(state, prefix), part, backbone)
        remedy = "set model.backbone, stem and width as in the file, or give --allow_partial"
        found.check(path, "model.backbone", remedy, allow_partial)
        state |= {prefix + name: tensor.clone() for name, tensor in found.matched.items()}
    origin = "both encoders" if both else "query encoder, key encoder = its copy"
    notes += [f"{contents.layout} layout, backbone: {origin}, each {found.text()}", adapted]
    notes.append(_restore_heads_and_queue(contents, state))
    beside = tensors_beside(contents.raw)
    notes += [f"left out: {groups(beside)}"] if beside else []
    return state, "; ".join(filter(None, notes))


def _refuse_variant(contents: Contents, network: nn.Module | None, allowed: bool) -> str:
    """Refuse a file of another network than the run's, or return a note about it."""
    model, _, known, questions = look(contents, contents.backbone("query"))
    heads = attention_heads(network)
    if is_own(model.backbone):  # names and shapes of its tensors are compared, and nothing else
        return ""
    if heads and not {"num_heads"} & {*known, *questions} and (own := named_heads(model)):
        known["num_heads"] = own
    if heads and known.get("num_heads", heads) != heads:
        wanted = known["num_heads"]
        if not allowed:
            raise UserError(
                f"{contents.path} is of a ViT with {wanted} attention heads, and the run's has "
                f"{heads}: set model.num_heads {wanted}, or give --allow_partial to start from its "
                "weights all the same"
            )
    elif heads:
        known.pop("num_heads", None)
    if _would_fix(model, contents.backbone("query"), network):
        if not allowed:
            raise UserError(
                f"{contents.path} is of a ViT with learned positions, which the run would keep as "
                "they are, since its positions are fixed: set model.positions learned, or give "
                "--allow_partial to start from its weights all the same"
            )
        known["positions"] = "learned"
    reasons = {"num_heads": "{} attention heads", "stem_relu": "no ReLU after its first BatchNorm"}
    reasons |= {"stem_padding": "a stem that pads by {}", "positions": "{} positions, now fixed"}
    if known.get("stem_padding") == 1:
        del known["stem_padding"]  # as in a run
    found = [text.format(known[name]) for name, text in reasons.items() if name in known]
    if found and not allowed:
        raise UserError(
            f"{contents.path} is of a network with {' and '.join(found)}, which no run here "
            "builds: take another, or give --allow_partial to start from its weights all the same"
        )
    unclear = [f"the file does not tell its {name}" for name in questions]
    beyond = translated(model, known, contents.backbone("query"))[1] if model.backbone else {}
    unclear += [f"not kept: {name} {value}" for name, value in beyond.items()]
    if is_named(contents) and _is_other(model.backbone, network):
        unclear.append(f"the file says that its network is {model.backbone}")
    return "; ".join([*(f"not kept: {text}" for text in found), *unclear])


def _would_fix(model: ModelConfig, part: State, network: nn.Module | None) -> bool:
    """Tell whether learned positions of a file would come to a run whose positions are fixed."""
    own, found = getattr(network, "pos_embed", None), part.get("pos_embed", ABSENT)
    if own is None or own.requires_grad or not fixed_positions({"pos_embed": own.detach()}):
        return False
    is_learned = model.positions == "learned" and not fixed_positions(part)
    return is_learned and found.is_floating_point() and found.ndim == 3


def _is_other(name: str, network: nn.Module | None) -> bool:
    """Tell whether a file names another network than the run's; names and shapes may be the same.

    Networks of different names may also be the same one, as DeiT's and ViT's, so it is said alone.
    """
    own = getattr(network, "pretrained_cfg", {}).get("architecture")
    return bool(own and name) and name.partition(".")[0] != own


def _to_channels(part: State, network: nn.Module | None) -> tuple[State, str]:
    """Fit the RGB weights of a first convolution to other channels, as timm does."""
    first = getattr(network, "pretrained_cfg", {}).get("first_conv")
    name = f"{first[0] if isinstance(first, list | tuple) else first}.weight"
    goal = {} if network is None else network.state_dict()
    if first is not None and name not in goal:
        name = "conv1.weight"  # of a stem of ours in the place of timm's
    if name not in part or name not in goal or part[name].shape[1:2] != (3,):
        return part, ""
    channels, weight = goal[name].shape[1], part[name]
    if channels == 3 or weight.ndim != 4 or not weight.is_floating_point():
        return part, ""
    fitted = adapt_input_conv(channels, weight)
    return part | {name: fitted}, f"first convolution fitted from 3 channels to {channels}"


def _restore_heads_and_queue(contents: Contents, state: State) -> str:
    """Fill heads, predictor and queues in place; all mean something only to their own heads."""
    prefixes = ("query_encoder.head.", "key_encoder.head.", "predictor.", "queue.", "second_queue.")
    found = {p: match_state(take(state, p), contents.take(p)) for p in prefixes}
    for side in ("query", "key"):
        head = found[f"{side}_encoder.head."]
        if not contents.take(f"{side}_encoder.head."):
            return f"heads and queue stay fresh, the file has no {side} head"
        if contents.layout not in _WITH_HEADS or not head.whole:
            return f"heads and queue stay fresh, the file's {side} head: {head.text()}"
    for prefix in [prefix for prefix in prefixes if found[prefix].whole]:
        state |= {prefix + name: t.clone() for name, t in found[prefix].matched.items()}
    said = ["heads"]
    for prefix in prefixes[2:]:
        name = prefix[:-1].replace("_", " ")
        if not take(state, prefix):
            said += [f"left out: the file's {name}"] if contents.take(prefix) else []
            continue
        keys = state.get(f"{prefix}keys")
        shape = "" if keys is None else f" of {shape_text(keys)}"
        fresh = f"the {name} stays fresh, the file's: {found[prefix].text()}"
        said.append(f"{name}{shape}" if found[prefix].whole else fresh)
    return "; ".join(said)
