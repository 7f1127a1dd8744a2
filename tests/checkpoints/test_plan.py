"""From one layout to the other and back: nothing is lost, and what does not fit is named."""

import diffusers
import pytest
import torch

from sana_sprint.autoencoder.model import AutoencoderDC
from sana_sprint.checkpoints.plan import Move, Plan, TensorInfo, plan_conversion
from sana_sprint.checkpoints.recognise import Family, recognise
from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.model import SanaTransformer2DModel

# Published parameters and tensors of diffusers' models; None where nobody has published a count.
COUNTS = {
    "sana-0.6b": (591_747_872, 548),
    "sana-0.6b-teacher": (591_876_896, 660),
    "sprint-0.6b": (593_501_216, 664),
    "sana-1.6b": (1_604_462_752, 396),
    "sana1.5-1.6b": (1_604_641_952, 476),
    "sprint-1.6b": (1_610_237_472, 480),
    "sana1.5-4.8b": (4_721_825_952, 1396),
    "controlnet-0.6b": (168_765_696, 162),
    "controlnet-1.6b": (631_576_960, 162),
    "dc-ae-sana": (312_250_275, 375),
    "dc-ae-lite": (None, None),
    "dc-ae-f32": (323_356_460, 362),
    "dc-ae-f64": (676_896_140, 418),
    "dc-ae-f128": (1_120_682_252, 474),
}
# Of so many tensors of each family, evenly spread over its file, damage is tried.
NUM_DAMAGED = 4
# These may be absent, and one of them of any size: their absence is no fault.
OPTIONAL = ("pos_embed", "y_embedder.y_embedding")


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def of_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    integers = {name: torch.int64 for name in shapes if name.endswith("num_batches_tracked")}
    return {name: TensorInfo(shape, integers.get(name, torch.bfloat16)) for name, shape in shapes.items()}


def carried_out(moves: tuple[Move, ...], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {move.target: move.apply([tensors[source] for source in move.sources]) for move in moves}


def converted(original, to="diffusers", **options) -> tuple[Family, Plan, dict[str, torch.Tensor]]:
    """What it is, the plan, and all tensors that the plan makes, those kept aside included."""
    family = recognise(infos(original.tensors), file_name=original.file_name, **options)
    plan = plan_conversion(family, infos(original.tensors), to)
    return family, plan, carried_out((*plan.moves, *plan.aside), original.tensors)


def assert_identical(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name  # shapes included


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bitwise_the_identity(original, dtype):
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in original.tensors.items()}
    family = recognise(infos(tensors), file_name=original.file_name)
    there = plan_conversion(family, infos(tensors), "diffusers")
    assert there.is_exact
    folder = carried_out((*there.moves, *there.aside), tensors)
    again = recognise(infos(folder), settings=family.config)
    assert again.config == family.config
    back = plan_conversion(again, infos(folder), "original")
    assert back.is_exact
    wanted = {n: t for n, t in tensors.items() if n not in (*there.dropped, *there.elsewhere)}
    assert_identical(carried_out(back.moves, folder), wanted)
    assert set(there.dropped) <= {"pos_embed"}
    assert original.name == "controlnet" or not there.elsewhere


def test_a_controlnets_file_is_whole_again_from_the_base_and_the_control(reduced):
    file = reduced("controlnet")
    whole = {}
    for kind in ("transformer", "controlnet"):
        family, plan, folder = converted(file, kind=kind)
        assert plan.is_exact
        assert family.kind == kind
        again = recognise(infos(folder), settings=family.config)
        whole |= carried_out(plan_conversion(again, infos(folder), "original").moves, folder)
    assert_identical(whole, {name: tensor for name, tensor in file.tensors.items() if name != "pos_embed"})


def test_the_result_loads_into_our_class_and_into_diffusers(original):
    family, plan, tensors = converted(original)
    model = {move.target: tensors[move.target] for move in plan.moves}
    ours, theirs = {
        "transformer": (SanaTransformer2DModel, diffusers.SanaTransformer2DModel),
        "autoencoder": (AutoencoderDC, diffusers.AutoencoderDC),
        "controlnet": (SanaControlNetModel, diffusers.SanaControlNetModel),
    }[family.kind]
    ours(**family.config).load_state_dict(model, strict=True)
    assert list(model) == list(ours(**family.config).state_dict())
    # diffusers' ControlNet starts from the latents, and has no use for the transformer's first block.
    model = {name: tensor for name, tensor in model.items() if not name.startswith("base_block.")}
    theirs.from_config(dict(family.config)).load_state_dict(model, strict=True)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_a_published_file_fits_its_model_with_the_published_counts(published, name):
    tensors = of_shapes(published(name))
    # Published counts of a ControlNet are of diffusers' class.
    settings = {"residual_placement": "after"} if name.startswith("controlnet") else None
    family = recognise(tensors, settings=settings)
    plan = plan_conversion(family, tensors, "diffusers")
    assert plan.is_exact, (plan.missing[:3], plan.unexpected[:3], plan.misshaped[:3])
    parameters, count = COUNTS[name]
    if count is not None:
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        shapes = [torch.Size(move.shape) for move in plan.moves if not move.target.endswith(statistics)]
        assert len(plan.moves) == count
        assert sum(shape.numel() for shape in shapes) == parameters
    folder = {move.target: TensorInfo(move.shape, torch.bfloat16) for move in (*plan.moves, *plan.aside)}
    back = plan_conversion(recognise(folder, settings=family.config), folder, "original")
    assert back.is_exact
    assert {move.target: move.shape for move in back.moves} == {
        key: info.shape for key, info in tensors.items() if key not in (*plan.dropped, *plan.elsewhere)
    }


@pytest.mark.parametrize("to", ["original", "diffusers"])
def test_a_controlnet_keeps_its_placement_there_and_back(reduced, to):
    for placement in ("before", "after"):
        _, _, folder = converted(reduced("controlnet"), settings={"residual_placement": placement})
        assert any(name.startswith("base_block.") for name in folder) == (placement == "before")
        again = recognise(infos(folder))
        tensors = carried_out(plan_conversion(again, infos(folder), to).moves, folder)
        assert recognise(infos(tensors), kind="controlnet").config["residual_placement"] == placement


def test_a_controlnet_without_the_transformers_first_block_cannot_start_from_it(reduced):
    _, _, folder = converted(reduced("controlnet"), settings={"residual_placement": "after"})
    plan = plan_conversion(
        recognise(infos(folder), settings={"residual_placement": "before"}), infos(folder), "original"
    )
    assert len(plan.missing) == 19
    assert all(name.startswith("base_block.") for name in plan.missing)


def test_a_part_and_a_single_tensor_are_views_and_only_a_join_is_a_copy(reduced):
    file = reduced("dc-ae-sana")
    storages = {tensor.untyped_storage().data_ptr() for tensor in file.tensors.values()}
    family, _, folder = converted(file)
    assert all(tensor.untyped_storage().data_ptr() in storages for tensor in folder.values())
    back = plan_conversion(recognise(infos(folder), settings=family.config), infos(folder), "original")
    for move in back.moves:
        result = move.apply([folder[source] for source in move.sources])
        assert (result.untyped_storage().data_ptr() in storages) == (len(move.sources) == 1)


def test_parts_are_taken_and_joined_in_their_order():
    rows = torch.arange(6).reshape(6, 1)
    thirds = [Move("x", ("y",), (2,), (index, 3)).apply([rows]) for index in range(3)]
    assert [third.tolist() for third in thirds] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(Move("y", ("a", "b", "c"), (6, 1)).apply(thirds), rows)


def test_what_belongs_to_training_is_kept_aside_and_goes_back(reduced):
    file = reduced("sprint")
    _, plan, _ = converted(file)
    assert [move.target for move in plan.aside] == [
        "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias"
    ]  # fmt: skip
    assert plan.dropped == ("pos_embed",)
    assert converted(reduced("sprint-bare"))[1].aside == ()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "module.", "base_model."])
def test_names_are_those_of_the_file_with_its_prefix(reduced, prefix):
    file = reduced("sprint")
    tensors = {prefix + name: tensor for name, tensor in file.tensors.items()}
    del tensors[f"{prefix}blocks.1.attn.qkv.weight"]
    tensors[f"{prefix}blocks.0.attn.proj.bias"] = torch.zeros(3)
    tensors[f"{prefix}blocks.0.extra"] = tensors["other"] = torch.zeros(3)
    family = recognise(infos(tensors))
    plan = plan_conversion(family, infos(tensors), "diffusers")
    assert family.prefix == prefix
    assert plan.dropped == (f"{prefix}pos_embed",)
    assert plan.missing == (f"{prefix}blocks.1.attn.qkv.weight",)
    assert sorted(plan.unexpected) == sorted([f"{prefix}blocks.0.extra", "other"])
    assert plan.misshaped == ((f"{prefix}blocks.0.attn.proj.bias", (3,), (64,)),)
    assert all(source.startswith(prefix) for move in plan.moves for source in move.sources)
    assert not any(move.target.startswith(prefix) for move in (*plan.moves, *plan.aside))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("damage", ["removed", "renamed", "enlarged", "flattened"])
def test_a_damaged_tensor_is_named(original, layout, damage):
    if layout == "original":
        tensors = infos(original.tensors)
    else:
        tensors = infos(converted(original)[2])
    of_model = {source for move in _plan_of(original, tensors, layout).moves for source in move.sources}
    names = [name for name in tensors if name in of_model and name not in OPTIONAL]
    for name in names[:: max(len(names) // NUM_DAMAGED, 1)]:
        damaged = dict(tensors)
        info = damaged.pop(name)
        if damage == "renamed":
            damaged[f"{name}_"] = info
        elif damage != "removed":
            shape = (
                (*info.shape, 1)
                if damage == "flattened"
                else (*(size + 2 for size in info.shape[:1]), *info.shape[1:]) or (2,)
            )
            damaged[name] = TensorInfo(shape, info.dtype)
        plan = _plan_of(original, damaged, "original" if layout == "diffusers" else "diffusers")
        if damage in ("removed", "renamed"):
            assert plan.missing == (name,)
            assert plan.unexpected == ((f"{name}_",) if damage == "renamed" else ())
            assert plan.misshaped == ()
        else:
            assert [(found[0], found[1]) for found in plan.misshaped] == [(name, shape)]
            assert plan.misshaped[0][2] == info.shape
            assert plan.missing == plan.unexpected == ()


def _plan_of(original, tensors: dict[str, TensorInfo], to) -> Plan:
    return plan_conversion(recognise(tensors, file_name=original.file_name), tensors, to)


@pytest.mark.parametrize("absent", ["logvar_linear.weight", "logvar_linear.bias"])
def test_half_of_what_is_kept_aside_is_not_enough(reduced, absent):
    file = reduced("sprint")
    del file.tensors[absent]
    assert converted_plan(file).missing == (absent,)


def test_what_is_kept_aside_must_fit_the_model(reduced):
    file = reduced("sprint")
    file.tensors["y_embedder.y_embedding"] = torch.zeros(7, 13)
    file.tensors["logvar_linear.weight"] = torch.zeros(2, 64)
    assert [found[:2] for found in converted_plan(file).misshaped] == [
        ("y_embedder.y_embedding", (7, 13)), ("logvar_linear.weight", (2, 64))
    ]  # fmt: skip


def converted_plan(file) -> Plan:
    tensors = infos(file.tensors)
    return plan_conversion(recognise(tensors), tensors, "diffusers")


def test_a_block_that_is_absent_altogether_is_missed_by_name(reduced):
    tensors = {n: t for n, t in infos(reduced("controlnet").tensors).items() if not n.startswith("blocks.1.")}
    plan = plan_conversion(recognise(tensors, kind="transformer"), tensors, "diffusers")
    assert len(plan.missing) == 15
    assert all(name.startswith("blocks.1.") for name in plan.missing)
    assert not plan.unexpected


def test_a_plan_for_the_layout_that_a_file_has_copies_it(original):
    tensors = infos(original.tensors)
    family = recognise(tensors, file_name=original.file_name)
    plan = plan_conversion(family, tensors, "original")
    assert plan.is_exact
    assert all(move.sources == (move.target,) and move.part is None for move in plan.moves)
    assert {move.target for move in plan.moves} == tensors.keys() - {*plan.dropped, *plan.elsewhere}
    assert plan.aside == ()


def test_a_config_that_contradicts_the_tensors_is_found_out_by_their_shapes(reduced):
    tensors = infos(reduced("sana").tensors)
    plan = plan_conversion(recognise(tensors, settings={"caption_channels": 13}), tensors, "diffusers")
    assert plan.misshaped[0] == ("y_embedder.y_proj.fc1.weight", (64, 12), (64, 13))


@pytest.mark.parametrize("kind", ["transformer", "controlnet"])
def test_tensors_that_a_setting_denies_are_unexpected_and_not_another_models(reduced, kind):
    file = reduced("sprint")
    if kind == "controlnet":
        file.tensors.update({name: t for name, t in reduced("controlnet").tensors.items() if name not in file.tensors})
    tensors = infos(file.tensors)
    embedder = {name for name in tensors if name.startswith("cfg_embedder.")}
    family = recognise(tensors, kind=kind, settings={"guidance_embeds": False, "qk_norm": None})
    assert embedder <= set(plan_conversion(family, tensors, "diffusers").unexpected)


def test_a_config_that_no_model_has_is_refused_in_one_line(reduced):
    tensors = infos(reduced("dc-ae-sana").tensors)
    family = recognise(tensors, settings={"decoder_norm_types": "layer_norm"})
    with pytest.raises(ValueError, match="no autoencoder of the sizes .* norm type must be") as error:
        plan_conversion(family, tensors, "diffusers")
    assert "\n" not in str(error.value)


def test_a_tensor_without_a_name_in_the_original_layout_is_refused():
    with torch.device("meta"):
        model = SanaTransformer2DModel(num_layers=1, attention_bias=True)
    tensors = of_shapes({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    family = recognise(tensors, settings={"attention_bias": True})
    with pytest.raises(ValueError, match="no name for transformer_blocks.0.attn1.to_q.bias"):
        plan_conversion(family, tensors, "original")
