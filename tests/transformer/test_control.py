"""The ControlNet: nothing before it has learnt, residuals where its config says, and what it refuses."""

import diffusers
import pytest
import torch
from peft import LoraConfig

from sana_sprint.transformer.control import SanaControlNetModel
from sana_sprint.transformer.residuals import EarlyResiduals

PLACEMENTS = ["after", "before"]
SHAPE = (2, 24, 32)  # of a residual: B N D


def samples_of(residuals) -> tuple[torch.Tensor, ...]:
    return residuals.samples if isinstance(residuals, EarlyResiduals) else residuals


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    "config", [{}, {"guidance_embeds": False, "qk_norm": None}, {"interpolation_scale": 1.0}], ids=str
)
@torch.no_grad()
def test_an_untrained_controlnet_changes_nothing(make_transformer, inputs, drawing, config, placement):
    transformer = make_transformer(num_layers=4, **config)
    control = SanaControlNetModel.from_transformer(transformer, num_layers=3, residual_placement=placement)
    if not transformer.config.guidance_embeds:
        del inputs["guidance"]
    residuals = control(**inputs, controlnet_cond=drawing).controlnet_block_samples
    assert [sample.shape for sample in samples_of(residuals)] == [SHAPE] * 3
    free = transformer(**inputs).sample
    assert torch.equal(transformer(**inputs, controlnet_block_samples=residuals).sample, free)
    # Not because the transformer would pass over them.
    for way_out in control.controlnet_blocks:
        torch.nn.init.eye_(way_out.weight)
    residuals = control(**inputs, controlnet_cond=drawing).controlnet_block_samples
    assert not torch.equal(transformer(**inputs, controlnet_block_samples=residuals).sample, free)


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_a_new_controlnet_is_a_copy_of_the_transformers_beginning(make_transformer, placement):
    transformer = make_transformer(num_layers=3).to(torch.bfloat16)
    control = SanaControlNetModel.from_transformer(transformer, num_layers=2, residual_placement=placement)
    assert control.dtype == torch.bfloat16
    source, ways = transformer.state_dict(), 0
    for name, tensor in control.state_dict().items():
        if name.startswith(("input_block.", "controlnet_blocks.")):
            assert not tensor.any(), name
            ways += 1
        else:
            assert torch.equal(tensor, source[name.replace("base_block.", "transformer_blocks.0.")]), name
    assert ways == 6
    assert (control.base_block is not None) == (placement == "before")
    for name in ("attention_head_dim", "caption_channels", "sample_size", "guidance_embeds", "qk_norm"):
        assert control.config[name] == transformer.config[name], name
    assert control.config.num_layers == 2
    next(control.parameters()).zero_()  # a copy, and not the same tensors
    assert all(torch.equal(tensor, source[name]) for name, tensor in transformer.state_dict().items())
    assert transformer.patch_embed.proj.weight.any()


@torch.no_grad()
def test_a_transformer_of_diffusers_can_be_copied_too(make_transformer):
    ours = make_transformer(num_layers=3)
    theirs = diffusers.SanaTransformer2DModel.from_config(ours.config)
    theirs.load_state_dict(ours.state_dict())
    states = [SanaControlNetModel.from_transformer(model, num_layers=2).state_dict() for model in (ours, theirs)]
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


@pytest.mark.parametrize("num_layers", [0, 3, 7])
def test_a_residual_that_would_have_no_block_to_act_on_is_refused(make_transformer, num_layers):
    with pytest.raises(ValueError, match=f"from 1 to 2 for a transformer of 3 blocks, got {num_layers}"):
        SanaControlNetModel.from_transformer(make_transformer(num_layers=3), num_layers=num_layers)


def test_a_transformer_with_adapters_is_refused(make_transformer):
    transformer = make_transformer(num_layers=3)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="copied before it is quantised, adapted or fused"):
        SanaControlNetModel.from_transformer(transformer, num_layers=2)


def test_an_unknown_placement_is_refused(make_control):
    with pytest.raises(ValueError, match="residual_placement must be after or before, got 'between'"):
        make_control(residual_placement="between")


def test_a_config_without_cross_attention_is_refused(make_control):
    with pytest.raises(ValueError, match="reads its caption by cross attention: .* must be numbers, got .*None"):
        make_control(cross_attention_dim=None)


def entering(transformer, inputs, residuals) -> list[torch.Tensor]:
    """What enters each block of the transformer, and what leaves the last."""
    seen = []
    hooks = [
        *(
            block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            for block in transformer.transformer_blocks
        ),
        transformer.norm_out.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    transformer(**inputs, controlnet_block_samples=residuals)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("kind", "first"), [(EarlyResiduals, 1), (tuple, 2)], ids=["before", "after"])
@torch.no_grad()
def test_residuals_enter_the_block_that_their_placement_says(make_transformer, inputs, kind, first):
    transformer = make_transformer(num_layers=3)
    residual = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    free, controlled = entering(transformer, inputs, None), entering(transformer, inputs, kind((residual,)))
    assert all(torch.equal(controlled[index], free[index]) for index in range(first))
    assert torch.equal(controlled[first], free[first] + residual)


@torch.no_grad()
def test_before_blocks_the_control_starts_from_the_first_blocks_output(make_transformer, inputs, drawing):
    transformer = make_transformer(num_layers=3)
    control = SanaControlNetModel.from_transformer(transformer, num_layers=2, residual_placement="before")
    torch.nn.init.eye_(control.controlnet_blocks[0].weight)
    residuals = control(**inputs, controlnet_cond=drawing).controlnet_block_samples
    # The copy of block 0 is run on the output of block 0: so is block 1, once it is made the same.
    transformer.transformer_blocks[1].load_state_dict(transformer.transformer_blocks[0].state_dict())
    assert torch.equal(residuals.samples[0], entering(transformer, inputs, None)[2])


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_the_drawing_and_every_other_input_count(make_control, inputs, drawing, placement):
    control = make_control(residual_placement=placement)
    wanted = samples_of(control(**inputs, controlnet_cond=drawing, return_dict=False)[0])
    for name in ("hidden_states", "encoder_hidden_states", "timestep", "guidance", "controlnet_cond"):
        changed = {**inputs, "controlnet_cond": drawing}
        changed[name] = changed[name] + 0.1
        assert not torch.allclose(samples_of(control(**changed)[0])[-1], wanted[-1]), name


@torch.no_grad()
def test_one_drawing_serves_all_pictures(make_control, inputs, drawing):
    control = make_control()
    shared = control(**inputs, controlnet_cond=drawing[:1])[0]
    wanted = control(**inputs, controlnet_cond=drawing[:1].expand(2, -1, -1, -1))[0]
    assert all(torch.equal(one, other) for one, other in zip(shared, wanted, strict=True))


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_a_scale_is_a_factor_of_the_residuals_for_all_pictures_or_each(make_control, inputs, drawing, placement):
    control = make_control(residual_placement=placement)

    def scaled(scale):
        return samples_of(control(**inputs, controlnet_cond=drawing, conditioning_scale=scale)[0])

    plain = scaled(1.0)
    for scale in (2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]]).double()):
        assert all(torch.equal(found, 2 * sample) for found, sample in zip(scaled(scale), plain, strict=True))
        assert {sample.dtype for sample in scaled(scale)} == {torch.float32}
    for found, sample in zip(scaled(torch.tensor([0.5, 2.0])), plain, strict=True):
        assert torch.equal(found, torch.stack([0.5 * sample[0], 2 * sample[1]]))
    assert not any(sample.any() for sample in scaled(0.0))


@pytest.mark.parametrize("scale", [torch.ones(3), torch.ones(2, 2)], ids=["3", "2x2"])
def test_scales_that_are_neither_one_nor_one_per_picture_are_refused(make_control, inputs, drawing, scale):
    with pytest.raises(ValueError, match="one number or one for each of 2 pictures, got "):
        make_control()(**inputs, controlnet_cond=drawing, conditioning_scale=scale)


@pytest.mark.parametrize("shape", [(2, 4, 6, 4), (2, 3, 4, 6), (3, 4, 4, 6), (4, 4, 6)], ids=str)
def test_a_drawing_of_another_shape_is_refused(make_control, inputs, shape):
    with pytest.raises(ValueError, match=r"latents of the shape \(2, 4, 4, 6\) of hidden_states, got "):
        make_control()(**inputs, controlnet_cond=torch.zeros(shape))


def test_guidance_is_needed_where_the_config_embeds_it_and_refused_elsewhere(make_control, inputs, drawing):
    with pytest.raises(ValueError, match="this network embeds its guidance .* pass guidance"):
        make_control()(**{**inputs, "guidance": None}, controlnet_cond=drawing)
    with pytest.raises(ValueError, match="guidance must be None"):
        make_control(guidance_embeds=False)(**inputs, controlnet_cond=drawing)


def gradients_of(control, inputs, drawing) -> dict[str, torch.Tensor]:
    control.zero_grad()
    samples = samples_of(control(**inputs, controlnet_cond=drawing)[0])
    sum(sample.square().mean() for sample in samples).backward()
    return {name: parameter.grad.clone() for name, parameter in control.named_parameters()}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_checkpointing_gives_the_same_gradients_for_every_parameter(make_control, inputs, drawing, placement):
    control = make_control(residual_placement=placement)
    drawing.requires_grad_()
    expected, expected_drawing = gradients_of(control, inputs, drawing), drawing.grad.clone()
    assert {name for name, gradient in expected.items() if gradient.abs().max() < 1e-6} == set()
    calls, drawing.grad = [], None
    control.transformer_blocks[0].attn1.register_forward_hook(lambda *_: calls.append(1))
    control.enable_gradient_checkpointing()
    found = gradients_of(control, inputs, drawing)
    assert len(calls) == 2  # forward, and once more in the backward pass
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(drawing.grad, expected_drawing)


def test_an_untrained_controlnet_learns_by_its_ways_out_first(make_transformer, inputs, drawing):
    transformer = make_transformer(num_layers=3).requires_grad_(False)
    control = SanaControlNetModel.from_transformer(transformer, num_layers=2)
    residuals = control(**inputs, controlnet_cond=drawing)[0]
    transformer(**inputs, controlnet_block_samples=residuals).sample.square().mean().backward()
    learning = {name for name, parameter in control.named_parameters() if parameter.grad.any()}
    assert learning == {f"controlnet_blocks.{index}.{part}" for index in (0, 1) for part in ("weight", "bias")}


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_a_saved_folder_is_the_same_controlnet(make_control, inputs, drawing, tmp_path, placement):
    control = make_control(residual_placement=placement)
    control.save_pretrained(tmp_path)
    loaded, report = SanaControlNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.residual_placement == placement
    pairs = zip(*(samples_of(model(**inputs, controlnet_cond=drawing)[0]) for model in (control, loaded)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@torch.no_grad()
def test_adapters_work_by_diffusers_methods_and_the_scale_of_the_call(make_control, inputs, drawing, tmp_path):
    control = make_control()
    plain = control(**inputs, controlnet_cond=drawing)[0][-1]
    torch.manual_seed(3)
    targets = ["to_q", "conv_point", "input_block", "controlnet_blocks.0"]
    control.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted = control(**inputs, controlnet_cond=drawing)[0][-1]
    assert (adapted - plain).abs().max() > 0.01
    off = control(**inputs, controlnet_cond=drawing, attention_kwargs={"scale": 0.0})[0][-1]
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=1e-5)  # float32, one product more per layer

    name = "pytorch_lora_weights.safetensors"
    control.save_lora_adapter(tmp_path, weight_name=name)
    other = make_control()
    other.load_lora_adapter(tmp_path, weight_name=name, prefix=None)
    torch.testing.assert_close(other(**inputs, controlnet_cond=drawing)[0][-1], adapted, atol=1e-5, rtol=1e-5)
