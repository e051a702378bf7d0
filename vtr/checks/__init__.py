"""Refuses plans: everything that can be known before anything is put on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

from vtr.checks.dense import check_dense, check_restoring
from vtr.checks.parts import check_parts
from vtr.hosts._dense import DenseHost
from vtr.hosts._probe import check_keywords, keywords_of
from vtr.hosts._protocol import Host, closed_tower
from vtr.plans import Plan, signal_layer, untapped
from vtr.types import Geometry, Method, Signal, Step, VtrError
from vtr.types.errors import SettingError, WrongType, WrongValue


def check_plan(plan: Plan, host: Host | DenseHost) -> None:
    """Refuses a plan whose steps are right one by one, but not together or not on this model.

    Raises:
        ValueError: budgets.
        VtrError: this host or its attention backend cannot.
    """
    freezing, choosing = (next((s.name for s in plan.steps if s.step.action == action), "") for action in ("freeze", "attend"))
    if freezing and choosing:
        raise VtrError(f"{choosing}: chooses keys of layers in which {freezing} freezes tokens; use one of the two")
    check_budgets(plan, host)
    check_backend(plan, host)
    check_restoring(plan)
    if isinstance(host, DenseHost):
        check_dense(plan, host)
    else:
        check_parts(plan, host)
        check_names(host, plan)
    check_text_towers(plan)


def check_steps(name: str, steps: Any) -> Sequence[Step]:
    """Returns the steps that a method gave, if they are steps.

    Raises:
        TypeError: they are something else.
    """
    wrong = [steps] if not isinstance(steps, (tuple, list)) else [s for s in steps if not isinstance(s, Step)]
    if wrong:
        raise WrongType(f"{name}: steps must return a tuple of vtr.Step, got {wrong[0]!r}; return (step,) for one step")
    return steps


def check_stage(method: Method, host: Host | DenseHost) -> None:
    """Refuses a method whose stages the host has none of.

    Raises:
        VtrError: naming its stage.
    """
    if not method.stages or set(method.stages) & set(host.stages):
        return
    asked = f"{method.name}: acts at stage {method.stages[0]!r}, but"
    if isinstance(host, DenseHost):
        raise VtrError(f"{asked} host {host.name!r} has no LLM; use a tower method such as 'expedit' or 'tome'")
    way = "use a method such as 'divprune'"
    if (host.pixel_limits is not None or host.token_budgets) and "input" in method.stages:
        way = "its processor makes images smaller: give --max-pixels, or that limit to the processor"
    raise VtrError(f"{asked} {host.name!r} can be reduced at the {' and the '.join(host.stages)} only; {way}")


def check_positions(method: Method, host: Host | DenseHost) -> None:
    """Refuses renumbered positions where they have no meaning.

    Raises:
        VtrError: naming the method.
    """
    if method.position_ids == "renumber" and not host.renumber:
        raise VtrError(f"{method.name}: position_ids='renumber' has no meaning for the rotary positions of {host.name}; leave it out")


def check_question(plan: Plan, question: str | Sequence[str] | None, processor: Any) -> None:
    """Refuses a question that is no text, and a plan that needs the question as text where none can be had.

    Raises:
        TypeError: neither a string nor a list of strings.
        ValueError: neither a question nor a processor.
    """
    if question is not None and not isinstance(question, str) and not all(isinstance(one, str) for one in question):
        raise WrongType(f"vtr.apply: question must be a string or a list of one string per prompt, got {question!r}")
    tokenizer = getattr(processor, "tokenizer", processor)
    for item in plan.steps:
        if question is None and tokenizer is None and any(signal.kind == "text_embedding" for signal in item.step.needs):
            raise WrongValue(f"{item.name}: needs the question as text, got neither; give processor= or question= beside the method")


def check_frame_scores(plan: Plan, scores: Any) -> None:
    """Refuses a plan that needs scores of frames where none are given, and scores that nobody reads.

    Raises:
        ValueError: saying which.
    """
    readers = [item.name for item in plan.steps for signal in item.step.needs if signal.kind == "frame_score"]
    if readers and scores is None:
        raise WrongValue(f"{readers[0]}: needs the relevance of every frame, got none; give frame_scores= (commands: --frame-scores MODEL)")
    if scores is not None and not readers:
        raise WrongValue(f"vtr.apply: no method of {plan.described()} reads frame_scores; leave them out")


def check_keys(name: str, step: Step, host: Host) -> None:
    """Refuses a step at new tokens, or one that takes keys of earlier layers from the cache, where layers have no such keys.

    Raises:
        VtrError: naming the layer, or a signal that is none of a new token.
    """
    layers = range(step.layer, host.llm_layers) if step.stage == "decode" else range(step.layer)
    other = next((i for i in layers if host.layer_kind(i) != "full_attention" or i not in host.with_keys), None)
    if other is not None:
        what = "chooses keys for new tokens" if step.stage == "decode" else "removes keys of earlier layers"
        raise VtrError(
            f"{name}: {what}, but layer {other} of {host.name!r} is of type {host.layer_kind(other)!r} or has no keys of its own; use a method "
            "that removes tokens"
        )
    for signal in step.needs if step.stage == "decode" else ():
        if signal.tower or (signal.kind, signal.queries, signal.keys, signal.softmax) != ("rows", "last", "visual", True):
            raise VtrError(f"{name}: asks for {signal} at a new token, where only attention(layer) of that token is known")


def check_text_towers(plan: Plan) -> None:
    """Refuses a checkpoint for the text of questions that is not CLIP; reads its config, on the hub where it is there.

    Raises:
        VtrError: naming the checkpoint.
    """
    from transformers import AutoConfig

    for source in {s.source for item in plan.steps for s in item.step.needs if s.kind == "text_embedding" and s.source}:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind != "clip":
            raise VtrError(
                f"text_tower: must be a CLIP checkpoint, got model type {kind!r} in {source!r}; relevance='similarity' needs none"
            )


def check_step(name: str, step: Step, host: Host | DenseHost, geometry: Geometry) -> None:
    """Refuses a step that this host cannot do, or a layer or signal that is not there.

    Raises:
        ValueError: layer out of range.
        VtrError: this host cannot.
    """
    if isinstance(host, Host) and host.closed and _enters_tower(step):
        raise closed_tower(name, host.closed)
    if not set(step.on) & set(geometry.kinds):
        raise VtrError(
            f"{name}: acts on the frames of videos, but {host.name!r} takes images only; let the images of a prompt be frames "
            "(visuals='prompt'), use a model with videos, or a method for images such as 'divprune'"
        )
    if step.stage not in host.stages or (step.action == "restore" and step.stage != "tower"):
        raise VtrError(
            f"{name}: host {host.name!r} does not do action {step.action!r} at stage {step.stage!r}; use a method that acts at the "
            f"{' or the '.join(host.stages)}"
        )
    if step.action == "freeze" and isinstance(host, Host) and host.hybrid:
        raise VtrError(f"{name}: freezes visual tokens, but linear layers on {host.name!r} pass them on in a state; remove tokens instead")
    if step.action == "freeze" and isinstance(host, Host) and host.latent_keys:
        raise VtrError(
            f"{name}: freezes visual tokens, whose keys the cache of {host.name!r} holds as one latent vector for all heads; remove tokens instead"
        )
    if step.action == "freeze" and getattr(host, "bidirectional", False):
        raise VtrError(f"{name}: freezes visual tokens, which see each other on {host.name!r}; use a method that removes tokens")
    if step.action == "restore" and isinstance(host, Host) and host.beside is not None:
        raise VtrError(
            f"{name}: gives merged patches back at the end of the tower, but {host.name!r} hands features of earlier layers to its LLM, too; use "
            "a method that restores nothing"
        )
    if step.action == "restore" and isinstance(host, Host) and not host.tower.by_views and host.tower.joins > 9:
        raise VtrError(
            f"{name}: tokens of {host.name!r} are {host.tower.joins} patches, whose rotary positions are too far apart to meet half-way; use a "
            "method that restores nothing"
        )
    if isinstance(host, Host) and (step.stage == "decode" or step.earlier_keys):
        check_keys(name, step, host)
    if step.stage in ("prefill", "decode"):
        deepest, least = geometry.llm_layers - 1, int(step.stage == "decode")
        if not least <= step.layer <= deepest:
            raise WrongValue(
                f"{name}: layer must be {least} to {deepest} in an LLM of {geometry.llm_layers} layers, got {step.layer} "
                f"(0-based, gone from its input; papers that count from 1 or say 'after layer {step.layer}' call it {step.layer + 1})"
            )
    if step.stage == "tower":
        deepest = min(host.feature_layers) + (step.action == "restore")
        if not 0 <= step.layer <= deepest:
            raise WrongValue(
                f"{name}: tower layer {step.layer} must be 0 to {deepest}, the layer whose output becomes features "
                f"(vision_feature_layer reads layers {', '.join(map(str, host.feature_layers))})"
            )
    for signal in step.needs:
        tower = signal.tower or step.stage in ("tower", "input")
        layer = signal_layer(signal, step)
        count = geometry.tower_layers if tower else geometry.llm_layers
        deepest_read = count - 1 if tower and step.stage != "tower" else step.layer - 1 if step.at == "layer" else step.layer
        if signal.kind == "text_embedding" and (step.stage != "boundary" or step.side != "after_projector"):
            raise VtrError(f"{name}: {signal.kind} is known behind the projector, not at stage {step.stage!r}; use a step at the boundary")
        if not tower and isinstance(host, Host) and step.stage == "prefill":
            _check_full(name, signal, step.layer if signal.kind.startswith("next_") else layer, host)
        if untapped(signal):
            continue
        if not tower and step.stage == "boundary":
            raise VtrError(f"{name}: {signal.kind} of an LLM layer is not known at the boundary; read the tower or prune at prefill")
        if not 0 <= layer <= deepest_read:
            place = "tower" if tower else "LLM"
            raise WrongValue(
                f"{name}: signal {signal.kind} of {place} layer {layer} is not known at layer {step.layer}; layers 0 to {deepest_read} are"
            )
        if signal.kind == "rows" and signal.queries == "visual" and getattr(host, "bidirectional", False):
            raise VtrError(
                f"{name}: reads what visual tokens attend to, but on {host.name!r} they see later ones, too; use a method that reads text"
            )
        if tower and signal.kind in ("attention_io", "mlp_io") and isinstance(host, Host) and host.tower.joins > 1:
            raise VtrError(f"{name}: {signal.kind} of a tower that joins patches has no row for a visual token; read the LLM")
        if signal.kind == "mlp_activation" and not tower and isinstance(host, Host) and host.language.down is None:
            raise VtrError(
                f"{name}: needs 'down_proj' of the MLP, the one projection behind its activation, which the layers of {host.name!r} lack; use "
                "another method, such as 'uniform', or register a host that knows this one"
            )
        if signal.kind in ("cls_row", "cls_v") and not host.has_cls:
            raise VtrError(f"{name}: needs the CLS token, but the tower of {host.name!r} has none; use a method without {signal.kind}")


def _enters_tower(step: Step) -> bool:
    """Whether a step reads or shortens the vision tower."""
    return step.stage in ("input", "tower") or step.side == "before_projector" or any(n.tower and not untapped(n) for n in step.needs)


def _check_full(name: str, signal: Signal, layer: int, host: Host) -> None:
    """Refuses a signal of an attention that has no rows, keys and positions.

    Raises:
        ValueError: naming the nearest layers that have them.
    """
    if signal.kind in ("rows", "q", "k", "v", "next_q", "next_k") and host.linear(layer):
        near = sorted(sorted(host.with_keys, key=lambda i: abs(i - layer))[:2])
        nearest = f"nearest {'are' if near[1:] else 'is'} {' and '.join(map(str, near))}"
        raise WrongValue(
            f"{name}: reads {signal.kind} of LLM layer {layer}, whose attention is linear and has none on {host.name!r}; read a layer of full "
            f"attention, {nearest} (by default a step at layer {near[0] + 1} reads layer {near[0]})"
        )


def check_budgets(plan: Plan, host: Host | DenseHost) -> None:
    """Refuses budgets above what an image can have, means that cannot be met, and methods that could remove nothing after others.

    Raises:
        ValueError: naming the budget.
    """
    averaged = [method.name for method in plan.methods if method.budget is not None and method.budget.average_keep is not None]
    if averaged and not plan.llm_layers:
        raise WrongValue(
            f"{averaged[0]}: average_keep is a mean over the layers of an LLM, and {host.name!r} has none; give keep or keep_ratio"
        )
    if len(averaged) > 1:
        raise WrongValue(
            f"vtr.apply: average_keep is the mean over the layers of the whole plan, so one method can have it, got {' and '.join(averaged)}; "
            "give the others keep or keep_ratio"
        )
    finishing = [plan.methods[n] for n in dict.fromkeys(s.method for s in plan.steps if s.last)]
    for method in finishing:
        keep = method.budget.keep if method.budget is not None else None
        if keep is not None and host.most_tokens is not None and keep > host.most_tokens and not host.has_video:
            raise SettingError(
                f"{method.name}: keep={keep} is above the {host.most_tokens} visual tokens that an image can have with this checkpoint; "
                "keep fewer",
                setting="keep",
            )
    if len(plan.methods) > 1 or averaged:
        _check_effect(plan, host)


def _check_effect(plan: Plan, host: Host | DenseHost) -> None:
    """Refuses a method that could not remove anything from any image, for what those that finish before it leave."""
    most = host.most_tokens
    if most is None:
        return  # depends on the image; refused when one comes
    # what is left after `keep`, a ratio and a mean bends only at these sizes of images
    grid = host.geometry().patch_grid if host.default_layout is None else None
    sizes = {most} if grid is None else {most, grid[0] * grid[1]}
    sizes |= {
        m.budget.keep for m in plan.methods if m.budget is not None and m.budget.keep is not None and min(sizes) < m.budget.keep < most
    }
    left = {n: n for n in sizes}
    for item in (s for s in plan.steps if s.last and plan.counted(s)):  # in the order in which methods finish
        method = plan.methods[item.method]
        budget = method.budget
        assert budget is not None
        if budget.average_keep is not None and host.default_layout is None:
            continue  # depends on the image; solved, or refused, when one comes
        final = {n: plan.final_keep(item.method, n) for n in sizes}
        if all(final[n] >= left[n] for n in sizes) and left[most] < most:
            given = next((k, v) for k, v in vars(budget).items() if v is not None)
            asked = ("" if getattr(method, given[0]) is not None else "its default ") + f"{given[0]}={given[1]:.6g}"
            raise WrongValue(
                f"{method.name}: {asked} removes nothing, {left[most]} tokens are left by the methods that act before it"
                + (" (a ratio is of the image's original tokens)" if given[0] == "keep_ratio" else "")
                + f"; lower it or leave {method.name} out"
            )
        left = {n: min(left[n], final[n]) for n in sizes}


def check_backend(plan: Plan, host: Host | DenseHost) -> None:
    """Refuses what the attention backend cannot do.

    Raises:
        VtrError: naming the backend.
    """
    for tower in (True, False):
        name = host.attention_name(tower)
        if name.startswith("paged"):
            raise VtrError(f"vtr.apply: paged attention ({name}) shares one cache between requests and cannot be reduced; use 'sdpa'")
        if not name.startswith("flash"):
            continue
        if not tower and isinstance(host, Host) and host.reads_positions:
            raise VtrError(
                f"vtr.apply: the attention of {host.name!r} takes position ids, whose gaps {name} takes for the starts of other prompts; use "
                "attn_implementation='sdpa'"
            )
        for s in plan.steps:
            if tower and s.step.stage == "tower" and s.step.action == "merge" and s.step.proportional:
                raise VtrError(
                    f"{s.name}: proportional attention adds a bias that {name} cannot take; use attn_implementation='sdpa' or proportional=False"
                )


def check_names(host: Host, plan: Plan) -> None:
    """Refuses a model whose modules lack a submodule that this plan reads, or an argument that the engine reads or writes.

    Raises:
        VtrError: naming the method and the module, or the argument and the versions.
    """
    for name, part, module in _needed(host, plan):
        try:
            part(module)
        except AttributeError as error:
            raise VtrError(
                f"{name}: needs {error.name!r} of {type(error.obj).__name__}, got a module without it; {host.name} is known with LLMs that are "
                "built like LLaMA: use another method, such as 'uniform', or register a host that knows this one"
            ) from error
    sequence = ("inputs_embeds", "attention_mask", "position_ids")
    check_keywords(host.base, "base model", ("input_ids", *sequence), cache=True)
    check_keywords(host.language.module, "language model", sequence, cache=True)
    frozen = {s.step.layer for s in plan.steps if s.step.action == "freeze"}
    projecting = frozen | {s.step.layer for s in plan.steps if any(n.kind.startswith("next_") for n in s.step.needs)}
    seen = set()
    for i, layer in enumerate(host.language.blocks):
        kind = (type(layer), i in frozen, i in projecting)
        if kind in seen:
            continue
        seen.add(kind)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in (keywords_of(layer) or {}).values())
        names = ("hidden_states", "attention_mask", "position_embeddings", *(() if open_ended else ("position_ids",)))
        check_keywords(layer, "layer of the LLM", names, cache=i in frozen)
        if i in projecting:
            attention = host.language.attention(layer)
            check_keywords(attention, "attention of the LLM", ("hidden_states", "attention_mask", "position_embeddings"))


def _needed(host: Host, plan: Plan) -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
    """Yields what a plan reads of a model: name of the method, a function that reads it, and what it is given."""
    language, tower = host.language, host.tower
    for item in plan.steps:
        step, name = item.step, item.name
        if item.removes or step.action == "freeze":
            yield name, attrgetter("rotary_emb"), language.module
        if step.final_norm and language.norm is None:
            yield name, attrgetter("norm"), language.module
        if step.action == "freeze":
            yield from ((name, part, language.blocks[step.layer]) for part in (language.attention, language.before_attention))
        if step.stage == "tower" and step.at == "mlp":
            yield from ((name, part, tower.blocks[step.layer]) for part in (tower.before_mlp, tower.mlp))
        if step.stage == "input" and tower.embeddings is None:
            yield name, attrgetter("embeddings"), tower.module
        for signal in step.needs:
            if signal.kind in ("text_embedding", "frame_score"):
                continue
            stack = tower if signal.tower or step.stage in ("tower", "input") else language
            if signal.kind.startswith("next_"):
                yield from ((name, part, stack.blocks[step.layer]) for part in (stack.attention, stack.before_attention))
                continue
            block = stack.blocks[signal_layer(signal, step)]
            yield name, stack.mlp if signal.kind.startswith("mlp_") else stack.attention, block
            if signal.kind == "mlp_activation" and stack.down is not None:
                yield name, stack.down, block
