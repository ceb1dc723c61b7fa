"""Held-out judges on tiny random networks, against the code that their authors publish."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffagent import compat
from diffagent.errors import ConfigError, ScoreError
from diffagent.rewards.convert import main as convert
from diffagent.rewards.judge_config import JudgesConfig
from diffagent.rewards.judges import AestheticScorer, PickScoreScorer
from diffagent.rewards.load import judge_files, load_judges
from diffagent.rewards.scorer import Runtime
from diffagent.sandbox.files import SCORERS

compat.install()

import torch  # noqa: E402
from torch import nn  # noqa: E402

PROMPTS = ["a red circle", "blue", "a red circle", "one two three four five " * 9]
CLIP = SCORERS / "clip"


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values, mode="RGB")


IMAGES = [picture(64, 64), picture(90, 40), picture(40, 90), picture(33, 32)]


@pytest.fixture(scope="module")
def pick_score(tmp_path_factory) -> Path:
    """A random CLIP in the layout of yuvalkirstain/PickScore_v1."""
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "projection_dim": 16, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config={**size, **heads, "max_position_embeddings": 24, "eos_token_id": 2},
        vision_config={**size, **heads, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    directory = tmp_path_factory.mktemp("judge") / "PickScore_v1"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    """A random head in the layout of sac+logos+ava1-l14-linearMSE.pth, for 64 features."""
    from ImageReward.ImageReward import MLP  # the same layers as the predictor's

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MLP(64)
        for layer in model.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight, gain=3)
    file = tmp_path_factory.mktemp("head") / "linearMSE.pth"
    torch.save(model.state_dict(), file)
    return file


def test_pick_score_is_its_model_cards_code(pick_score):
    import open_clip
    from open_clip.transform import image_transform
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(pick_score).eval()
    transform = image_transform(32, is_train=False)
    ids = open_clip.SimpleTokenizer(context_length=24)(PROMPTS)
    with torch.no_grad():
        image = model.get_image_features(torch.stack([transform(i) for i in IMAGES])).pooler_output
        text = model.get_text_features(ids).pooler_output
    image, text = (x / torch.norm(x, dim=-1, keepdim=True) for x in (image, text))
    expected = model.logit_scale.exp() * (text * image).sum(-1)
    scorer = PickScoreScorer.load(str(pick_score))
    got = scorer.score(PROMPTS, IMAGES)
    np.testing.assert_allclose(got.scores, expected.detach().numpy(), atol=1e-4)
    assert got.scores.std() > 0.1
    assert got.truncated.tolist() == [False, False, False, True]
    assert scorer.version == "PickScore_v1"


def test_pick_score_is_read_from_safetensors_that_fit(pick_score, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((pick_score / name).read_bytes())
    with pytest.raises(ConfigError, match="SHA256"):
        PickScoreScorer.load(str(tmp_path), sha256="0" * 64)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ScoreError, match=r"visual_projection\.weight"):
        PickScoreScorer.load(str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors only"):
        PickScoreScorer.load(str(tmp_path))


def test_the_aesthetic_head_reads_unit_features_and_no_prompt(head):
    import open_clip
    from ImageReward.ImageReward import MLP

    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    mlp = MLP(64).eval()
    mlp.load_state_dict(torch.load(head, weights_only=True))
    with torch.no_grad():
        features = clip.eval().encode_image(torch.stack([preprocess(i) for i in IMAGES]))
        expected = mlp(nn.functional.normalize(features))[:, 0].numpy()
    scorer = AestheticScorer.load(str(CLIP), head=head)
    got = scorer.score(PROMPTS, IMAGES)
    np.testing.assert_allclose(got.scores, expected, rtol=1e-4, atol=1e-5)
    assert got.scores.std() > 1e-3
    assert not got.truncated.any()
    assert np.array_equal(scorer.score(["x"] * 4, IMAGES).scores, got.scores)
    rough = AestheticScorer.load(str(CLIP), head=head, runtime=Runtime(dtype="bfloat16"))
    assert np.abs(rough.score(PROMPTS, IMAGES).scores - expected).max() < 0.5  # of 25


def test_a_converted_checkpoint_is_the_same_judge(head, tmp_path):
    convert([str(head), str(tmp_path / "head.safetensors")])
    first = AestheticScorer.load(str(CLIP), head=head)
    second = AestheticScorer.load(str(CLIP), head=tmp_path / "head.safetensors")
    assert first.digest == second.digest


def test_what_is_no_head_is_refused(tmp_path):
    file = tmp_path / "head.pth"
    for state in ({"layers.0.weight": torch.zeros(3)}, {"mlp": torch.zeros(3)}):
        torch.save(state, file)
        with pytest.raises(ScoreError, match="no head of linear layers"):
            AestheticScorer.load(str(CLIP), head=file)
    with pytest.raises(ConfigError, match="do not exist"):
        AestheticScorer.load(str(CLIP), head=tmp_path / "gone.pth")


def test_judges_come_from_a_configuration(pick_score, head):
    judges = [
        {"name": "aesthetic", "model": str(CLIP), "head": str(head)},
        {"name": "pick_score", "model": str(pick_score)},
    ]
    config = JudgesConfig.model_validate({"judges": judges, "batch_size": 2})
    loaded = load_judges(config)
    assert [judge.name for judge in loaded] == ["aesthetic", "pick_score"]
    assert all(math.isfinite(s) for j in loaded for s in j.score(PROMPTS, IMAGES).scores)
    assert {head, pick_score / "model.safetensors"} <= set(judge_files(config))
    with pytest.raises(ConfigError, match="twice"):
        load_judges(JudgesConfig.model_validate({"judges": judges[:1] * 2}))
    with pytest.raises(ValueError, match="head"):
        JudgesConfig.model_validate({"judges": [{"name": "aesthetic", "model": "ViT-L-14"}]})
    assert json.loads(config.model_dump_json())["judges"][1]["model"] == str(pick_score)
