"""What the transformer's inputs mean, and what it refuses."""

from typing import Any

import pytest
import torch

SAME: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}  # float32, the same sums in batches of another size


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(make_transformer, inputs):
    model = make_transformer()
    together = model(**inputs).sample
    for index in range(2):
        alone = model(**{name: value[index : index + 1] for name, value in inputs.items()}).sample
        torch.testing.assert_close(alone[0], together[index], **SAME)


@torch.no_grad()
def test_one_time_serves_all_pictures(make_transformer, inputs):
    model = make_transformer()
    per_picture = model(**{**inputs, "timestep": torch.tensor([0.4, 0.4])}).sample
    for shared in (torch.tensor(0.4), torch.tensor([0.4])):
        assert torch.equal(model(**{**inputs, "timestep": shared}).sample, per_picture)
    assert not torch.equal(model(**{**inputs, "timestep": torch.tensor(0.5)}).sample, per_picture)


@torch.no_grad()
def test_masked_text_has_no_influence(make_transformer, inputs):
    model = make_transformer()
    expected = model(**inputs).sample
    inputs["encoder_hidden_states"][0, 3:] = 100.0
    assert torch.equal(model(**inputs).sample, expected)
    inputs["encoder_hidden_states"][0, 2] = 100.0
    assert not torch.equal(model(**inputs).sample[0], expected[0])


@torch.no_grad()
def test_masked_text_may_as_well_be_left_out(make_transformer, inputs):
    model = make_transformer()
    short = {name: value[:1] for name, value in inputs.items()}
    padded = model(**short).sample
    short["encoder_hidden_states"] = short["encoder_hidden_states"][:, :3]
    torch.testing.assert_close(model(**{**short, "encoder_attention_mask": None}).sample, padded, **SAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_caption_masked_altogether_does_not_become_nan(make_transformer, inputs, dtype):
    inputs["encoder_attention_mask"] = torch.zeros(2, 7, dtype=torch.bool)
    for name in ("hidden_states", "encoder_hidden_states"):
        inputs[name] = inputs[name].to(dtype)
    assert make_transformer().to(dtype)(**inputs).sample.isfinite().all()


@torch.no_grad()
def test_a9_a_mask_of_image_tokens_is_ignored_as_documented(make_transformer, inputs):
    model = make_transformer()
    assert torch.equal(model(**inputs, attention_mask=torch.zeros(2, 24)).sample, model(**inputs).sample)
    assert "attention_mask: ignored" in str(model.forward.__doc__)
    assert "timestep_scale: ignored" in str(type(model).__doc__)


@torch.no_grad()
def test_a_residual_after_the_last_block_reaches_the_last_norm_unchanged(make_transformer, inputs):
    model, seen = make_transformer(), []
    model.norm_out.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    residual = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(2))
    model(**inputs)
    model(**inputs, controlnet_block_samples=(residual,))  # number 0 comes after the second block, here the last
    assert torch.equal(seen[1], seen[0] + residual)


@torch.no_grad()
def test_inputs_are_not_written_to(make_transformer, inputs):
    model = make_transformer(interpolation_scale=1.0)
    before = {name: value.clone() for name, value in inputs.items()}
    residuals = (torch.ones(2, 24, 32),)
    model(**inputs, controlnet_block_samples=residuals)
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    assert torch.equal(residuals[0], torch.ones(2, 24, 32))


def test_a7_a_text_batch_that_does_not_fit_is_refused(make_transformer, inputs):
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:1, :6]
    with pytest.raises(ValueError, match="one caption per latent: got 1 captions for 2 latents"):
        make_transformer()(**{**inputs, "encoder_attention_mask": None})


def test_b9_guidance_is_needed_where_the_config_embeds_it(make_transformer, inputs):
    with pytest.raises(ValueError, match="pass guidance, one number per image"):
        make_transformer()(**{**inputs, "guidance": None})


def test_b9_guidance_is_refused_where_the_config_does_not_embed_it(make_transformer, inputs):
    with pytest.raises(ValueError, match="guidance must be None"):
        make_transformer(guidance_embeds=False)(**inputs)


@pytest.mark.parametrize("name", ["cross_attention_dim", "num_cross_attention_heads", "cross_attention_head_dim"])
def test_b11_a_config_without_cross_attention_is_refused(make_transformer, name):
    with pytest.raises(ValueError, match="reads its caption by cross attention: .* must be numbers, got .*None"):
        make_transformer(**{name: None})


def test_c5_a_size_that_is_no_multiple_of_the_patch_is_refused(make_transformer, inputs):
    inputs["hidden_states"] = torch.zeros(2, 4, 9, 6)
    with pytest.raises(ValueError, match="multiples of the patch size 2, got 9x6"):
        make_transformer(patch_size=2)(**inputs)


@pytest.mark.parametrize("shape", [(7,), (2, 1, 1, 7)], ids=str)
def test_a_mask_of_another_rank_is_refused(make_transformer, inputs, shape):
    inputs["encoder_attention_mask"] = torch.ones(shape)
    with pytest.raises(ValueError, match=r"must be \(batch, tokens\) or \(batch, 1, tokens\), got \("):
        make_transformer()(**inputs)


def test_an_unknown_qk_norm_is_refused(make_transformer):
    with pytest.raises(ValueError, match="qk_norm must be None or"):
        make_transformer(qk_norm="layer_norm")
