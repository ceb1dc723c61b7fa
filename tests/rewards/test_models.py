"""The scorers' code on tiny random networks, against the official packages."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffagent.errors import ConfigError, ScoreError
from diffagent.rewards import official
from diffagent.rewards.load import load_scorers, reward_files
from diffagent.rewards.scorer import PromptCache, Runtime
from diffagent.sandbox.files import SCORERS
from diffagent.store import sha256_file

official.install()

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from diffagent.rewards import image_reward as ir  # noqa: E402
from diffagent.rewards.clip import ClipScorer, encode_text  # noqa: E402
from diffagent.rewards.hps import HPSScorer  # noqa: E402
from diffagent.rewards.image_reward import ImageRewardConfig, ImageRewardScorer  # noqa: E402
from diffagent.rewards.score_config import RewardsConfig, ScorerConfig  # noqa: E402
from diffagent.rewards.score_stage import score, score_pictures  # noqa: E402

PROMPTS = ["a red circle", "blue", "a red circle", "one two three four five", "green star"]
TINY_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "vocab_size": 40,
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values, mode="RGB")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    sizes = [(64, 64), (90, 40), (40, 90), (33, 32), (32, 32)]
    return [picture(w, h, seed) for seed, (w, h) in enumerate(sizes)]


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory) -> Path:
    """A random CLIP of open_clip with CLIP's own vocabulary."""
    from open_clip.model import CLIP

    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    directory = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(**config)
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}, "version": "random"})
    )
    return directory


def write_vocabulary(directory: Path) -> None:
    words = ["a", "red", "circle", "blue", "one", "two", "three", "four", "five", "green", "star"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (directory / "vocab.txt").write_text("\n".join([*special, *words]) + "\n")


def random_image_reward(config: ImageRewardConfig) -> torch.nn.Module:
    """A network whose rewards vary: initial weights of the head are close to zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ir.build_model(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    return model


@pytest.fixture(scope="module")
def image_reward_directory(tmp_path_factory) -> Path:
    config = ImageRewardConfig(
        version="random",
        image_size=32,
        patch_size=16,
        vision_width=32,
        vision_depth=2,
        vision_heads=2,
        embed_dim=16,
        text=TINY_BERT,
    )
    directory = tmp_path_factory.mktemp("image_reward")
    state = {k: v.contiguous().clone() for k, v in random_image_reward(config).state_dict().items()}
    save_file(state, directory / ir.WEIGHTS)
    (directory / ir.CONFIG).write_text(json.dumps(vars(config)))
    write_vocabulary(directory)
    return directory


@pytest.fixture(params=["clip", "hps_v2", "image_reward"])
def load(request, clip_directory, image_reward_directory):
    """Each scorer's loader, bound to a directory with a random network."""
    scorer, directory = {
        "clip": (ClipScorer, clip_directory),
        "hps_v2": (HPSScorer, clip_directory),
        "image_reward": (ImageRewardScorer, image_reward_directory),
    }[request.param]

    def load(*, sha256=None, **runtime):
        return scorer.load(str(directory), sha256=sha256, runtime=Runtime(**runtime))

    return load


def test_a_batch_scores_as_its_pictures_one_by_one(load, images):
    scorer = load(batch_size=2)
    together = scorer.score(PROMPTS, images)
    single = [scorer.score([p], [i]).scores[0] for p, i in zip(PROMPTS, images, strict=True)]
    assert together.scores.dtype == np.float32
    assert together.scores.std() > 1e-3
    np.testing.assert_allclose(together.scores, single, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_and_one_that_does_not_pair_up(load, images):
    scorer = load()
    assert scorer.score([], []).scores.shape == (0,)
    with pytest.raises(ScoreError, match="2 prompts and 1 pictures"):
        scorer.score(["a", "b"], images[:1])


def test_prompts_that_are_cut_are_counted_and_their_end_changes_nothing(load, images):
    scorer = load()
    long = "red " * 60
    batch = scorer.score(["red", long, long + "blue"], [images[0]] * 3)
    assert batch.truncated.tolist() == [False, True, True]
    assert batch.scores[1] == pytest.approx(batch.scores[2], rel=1e-5, abs=1e-6)


def test_the_longest_prompt_that_fits_is_not_counted(load, images):
    scorer = load()
    room = 14 if scorer.name != "image_reward" else 33
    fits, cut = " ".join(["red"] * room), " ".join(["red"] * (room + 1))
    assert scorer.score([fits, cut], images[:2]).truncated.tolist() == [False, True]


def test_digests_follow_weights_and_preprocessing(load, clip_directory):
    scorer = load()
    assert scorer.digest == load().digest
    assert len(scorer.digest) == 64
    assert scorer.version == "random"
    # HPS pads where CLIP crops: same weights, other scores, other digest.
    assert ClipScorer.load(str(clip_directory)).digest != HPSScorer.load(str(clip_directory)).digest


def test_bfloat16_is_close_and_unknown_dtypes_are_refused(load, images):
    exact = load().score(PROMPTS, images).scores
    rough = load(dtype="bfloat16").score(PROMPTS, images).scores
    assert np.abs(exact - rough).max() < 0.1 * max(1.0, float(np.abs(exact).max()))
    assert not np.array_equal(exact, rough)
    with pytest.raises(ConfigError, match="float8"):
        load(dtype="float8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("float16", 2e-2)])
def test_a_gpu_gives_the_scores_of_the_cpu(load, images, dtype, tolerance):
    """Batches from page-locked memory, more of them than are prefetched."""
    exact = load().score(PROMPTS, images).scores
    scorer = load(device="cuda", dtype=dtype)
    got = score_pictures([scorer], PROMPTS, images, batch_size=1, threads=2)
    scale = max(1.0, float(np.abs(exact).max()))
    np.testing.assert_allclose(got.metrics[scorer.name], exact, atol=tolerance * scale)


def test_a_prompt_is_encoded_once():
    seen: list[str] = []

    def compute(prompts):
        seen.extend(prompts)
        return [p.upper() for p in prompts]

    cache = PromptCache(compute, size=2)
    assert cache.get(["a", "b", "a"]) == ["A", "B", "A"]
    assert cache.get(["b", "a"]) == ["B", "A"]
    assert seen == ["a", "b"]
    cache.get(["a", "c"])  # b has not been used for longest
    cache.get(["a", "c"])
    assert seen == ["a", "b", "c"]
    cache.get(["b"])
    assert seen == ["a", "b", "c", "b"]


def test_clip_is_open_clips_own_cosine(clip_directory, images):
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_directory}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_directory}")
    model.eval()
    with torch.no_grad():
        image, text, _ = model(torch.stack([preprocess(i) for i in images]), tokenizer(PROMPTS))
    expected = (image * text).sum(-1).numpy()
    got = ClipScorer.load(str(clip_directory)).score(PROMPTS, images).scores
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_16_bits_copy_no_weights_for_each_picture(clip_directory, images):
    """torch's attention would, whose inputs it has transposed: a batched product with copies."""
    scorer = ClipScorer.load(str(clip_directory), runtime=Runtime(dtype="bfloat16"))
    with torch.profiler.profile() as profile:
        scorer.score(PROMPTS, images)
    called = {event.key for event in profile.key_averages()}
    assert "aten::addmm" in called
    assert "aten::bmm" not in called


def test_openai_weights_get_quick_gelu(monkeypatch):
    import open_clip

    passed = {}

    def create_model(name, **options):
        passed.update(options)
        raise RuntimeError("no weights here")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr("diffagent.rewards.clip.hub_file", lambda *names: Path(*names[:2]))
    for tag, quick in (("openai", True), ("laion2b_s32b_b82k", False)):
        with pytest.raises(ScoreError, match="ViT-L-14"):
            ClipScorer.load("ViT-L-14", tag)
        assert passed["force_quick_gelu"] is quick
        assert passed["weights_only"] is True
        assert passed["pretrained"].endswith("/open_clip_model.safetensors")


def test_weights_with_another_hash_are_refused(load):
    with pytest.raises(ConfigError, match="SHA256"):
        load(sha256="0" * 64)
    file = SCORERS / "clip" / "open_clip_model.safetensors"
    assert ClipScorer.load(str(file.parent), sha256=sha256_file(file).upper()).digest


def test_one_release_of_hps_is_not_taken_for_another(tmp_path):
    (tmp_path / "HPS_v2.1_compressed.pt").touch()
    with pytest.raises(ConfigError, match="another release"):
        HPSScorer.load("v2", tmp_path / "HPS_v2.1_compressed.pt")


def test_a_prompt_is_read_up_to_its_end_token_with_the_same_features(clip_directory):
    scorer = ClipScorer.load(str(clip_directory))
    ids = scorer.tokenizer(PROMPTS)
    seen = []
    scorer.model.transformer.register_forward_hook(lambda m, a, o: seen.append(o.shape[1]))
    with torch.inference_mode():
        short = encode_text(scorer.model, ids, "cpu")
        whole = scorer.model.encode_text(ids)
    torch.testing.assert_close(short, whole)
    assert seen == [7, 16]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("load", ["clip", "image_reward"], indirect=True)
def test_compiled_scores_are_the_same_and_a_short_batch_is_filled_up(load, images):
    plain, compiled = load(), load(compiled=True, batch_size=3)
    np.testing.assert_allclose(
        compiled.score(PROMPTS, images).scores, plain.score(PROMPTS, images).scores, atol=1e-4
    )


def test_hps_is_the_packages_score_with_the_packages_preprocessing(
    clip_directory, images, monkeypatch, tmp_path
):
    """hpsv2's own `score`, its network swapped for the tiny one and its loading left in."""
    official.install()
    import hpsv2.img_score as package
    import open_clip
    from hpsv2.src.open_clip import factory
    from hpsv2.src.open_clip import model as their_model
    from safetensors.torch import load_file

    config = json.loads((clip_directory / "open_clip_config.json").read_text())["model_cfg"]
    network = their_model.CLIP(**config, output_dict=True)
    state = load_file(clip_directory / "open_clip_model.safetensors")
    checkpoint = tmp_path / "HPS.pt"
    torch.save({"state_dict": {**network.state_dict(), **state}}, checkpoint)
    preprocess = factory.image_transform(32, is_train=False, resize_longest_max=True)
    monkeypatch.setattr(package, "model_dict", {"model": network, "preprocess_val": preprocess})
    monkeypatch.setattr(
        package, "get_tokenizer", lambda name: open_clip.SimpleTokenizer(context_length=16)
    )
    expected = [
        package.score([image], prompt, cp=str(checkpoint))[0]
        for prompt, image in zip(PROMPTS, images, strict=True)
    ]
    got = HPSScorer.load(str(clip_directory)).score(PROMPTS, images).scores
    np.testing.assert_allclose(got, expected, atol=1e-5)
    cropped = ClipScorer.load(str(clip_directory)).score(PROMPTS, images).scores
    assert np.abs(got - cropped).max() > 1e-3  # the wide picture differs


def official_image_reward(scorer: ImageRewardScorer):
    """The package's class around its own modules, with the weights of a scorer."""
    official.install()
    from ImageReward.ImageReward import ImageReward, _transform

    package = ImageReward.__new__(ImageReward)
    torch.nn.Module.__init__(package)
    network = official.build_image_reward(scorer.config)
    network.load_state_dict(scorer.model.state_dict())
    package.device, package.preprocess = "cpu", _transform(scorer.config.image_size)
    package.blip, package.mlp = network.blip, network.mlp.layers
    package.mean, package.std = scorer.config.mean, scorer.config.std
    package.blip.tokenizer = scorer.tokenizer
    return package.eval()


def test_image_reward_is_the_packages_own_score(image_reward_directory, images):
    """The package's `score` and `inference_rank` on the same weights, one picture at a time."""
    scorer = ImageRewardScorer.load(str(image_reward_directory))
    package = official_image_reward(scorer)
    ours = scorer.score(PROMPTS, images).scores
    theirs = [package.score(prompt, image) for prompt, image in zip(PROMPTS, images, strict=True)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    ranks, rewards = package.inference_rank("a red circle", images)
    ours = scorer.score(["a red circle"] * len(images), images).scores
    np.testing.assert_allclose(ours, rewards, rtol=1e-4, atol=1e-5)
    assert ranks == [int((ours > reward).sum()) + 1 for reward in ours]


def test_the_released_layout_is_the_packages(monkeypatch):
    """Names and shapes of our full-size network are those of the package's constructor."""
    official.install()
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip_pretrain

    monkeypatch.setattr(blip_pretrain, "init_tokenizer", lambda: None)
    config = ImageRewardConfig()
    med_config = {**config.text, "encoder_width": 768, "add_cross_attention": True}
    monkeypatch.setattr(
        blip_pretrain.BertConfig,
        "from_json_file",
        classmethod(lambda cls, path: cls(**med_config)),
    )
    linspace = torch.linspace  # its values are read in the constructor: not on "meta"
    monkeypatch.setattr(torch, "linspace", lambda *a: linspace(*a, device="cpu"))
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in ImageReward("med.json").state_dict().items()}
    monkeypatch.undo()
    with torch.device("meta"):
        ours = {k: tuple(v.shape) for k, v in ir.build_model(config).state_dict().items()}
    assert ours == theirs


def test_a_released_checkpoint_is_read_without_pickled_code(tmp_path, image_reward_directory):
    from safetensors.torch import load_file

    config = ir.read_config(image_reward_directory)
    state = load_file(image_reward_directory / ir.WEIGHTS)
    good, evil = tmp_path / "good.pt", tmp_path / "evil.pt"
    torch.save(state, good)
    network = ir.build_model(config)
    ir.load_weights(network, good)
    assert torch.equal(network.mlp.layers[0].weight, state["mlp.layers.0.weight"])
    torch.save({"mlp.layers.0.weight": random.Random(0)}, evil)
    with pytest.raises(ScoreError, match=r"evil\.pt.*weights_only"):
        ir.load_weights(network, evil)
    torch.save({"mlp.layers.0.weight": "text"}, evil)
    with pytest.raises(ScoreError, match="other values than tensors"):
        ir.load_weights(network, evil)


def test_wrong_weights_and_missing_files_are_named(tmp_path, image_reward_directory):
    network = ir.build_model(ir.read_config(image_reward_directory))
    file = tmp_path / "half.safetensors"
    save_file({"mlp.layers.0.bias": torch.zeros(1024)}, file)
    with pytest.raises(ScoreError, match=r"half\.safetensors.*lacks"):
        ir.load_weights(network, file)
    save_file({"mlp.layers.0.bias": torch.zeros(3)}, file)
    with pytest.raises(ScoreError, match="does not fit"):
        ir.load_weights(network, file)
    with pytest.raises(ConfigError, match=r"gone\.safetensors"):
        ir.load_weights(network, tmp_path / "gone.safetensors")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ImageRewardScorer.load(str(tmp_path))
    with pytest.raises(ConfigError, match="open_clip_config"):
        ClipScorer.load(str(tmp_path))
    with pytest.raises(ConfigError, match="neither a file nor one of the tags"):
        ClipScorer.load("ViT-B-32", "no-such-tag")
    with pytest.raises(ConfigError, match="v3"):
        HPSScorer.load("v3")


@pytest.mark.parametrize("name", ["hps_v2", "image_reward"])
def test_the_official_backend_gives_the_same_scores_and_digest(name, images):
    """The authors' modules on the committed weights, as a setting of a scorer."""
    spec = {"name": name, "model": str(SCORERS / name)}
    [default] = load_scorers(RewardsConfig.model_validate({"scorers": [spec]}))
    [package] = load_scorers(
        RewardsConfig.model_validate({"scorers": [{**spec, "backend": "official"}]})
    )
    assert package.model.__class__ is not default.model.__class__ or name == "image_reward"
    encoder = package.model.visual if name == "hps_v2" else package.model.blip.visual_encoder
    assert type(encoder).__module__.startswith(("hpsv2.", "ImageReward."))
    assert package.digest == default.digest
    expected = default.score(PROMPTS, images).scores
    np.testing.assert_allclose(package.score(PROMPTS, images).scores, expected, atol=1e-5)


def test_a_backend_enters_the_identity_only_when_it_is_set():
    spec = ScorerConfig(name="hps_v2", model="v2")
    assert "backend" not in spec.model_dump(mode="json")
    official_spec = ScorerConfig(name="hps_v2", model="v2", backend="official")
    assert official_spec.model_dump(mode="json")["backend"] == "official"
    with pytest.raises(ValueError, match="'clip' is open_clip itself"):
        ScorerConfig(name="clip", model="ViT-L-14", backend="official")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps image-reward==1\.5"):
        official.build_image_reward(ImageRewardConfig())


def test_the_default_backend_imports_no_package_of_the_authors():
    script = (
        "import sys\n"
        "sys.modules['ImageReward'] = sys.modules['hpsv2'] = None\n"
        "from diffagent.rewards.load import load_scorers\n"
        "from diffagent.rewards.score_config import RewardsConfig\n"
        f"names, root = ('clip', 'image_reward', 'hps_v2'), {str(SCORERS)!r}\n"
        "specs = [{'name': name, 'model': f'{root}/{name}'} for name in names]\n"
        "load_scorers(RewardsConfig.model_validate({'scorers': specs}))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_bytes_of_a_scorer_and_a_reference_belong_to_the_request(tmp_path: Path) -> None:
    shutil.copytree(SCORERS, tmp_path / "scorers")
    config = RewardsConfig(
        scorers=(ScorerConfig(name="clip", model=str(tmp_path / "scorers" / "clip")),),
        reference=str(tmp_path / "scorers" / "reference.json"),
    )
    names = {path.name for path in reward_files(config)}
    assert {"open_clip_model.safetensors", "reference.json"} <= names
    assert "model.safetensors" not in names, "of ImageReward, which is not configured"
    before = score.identity(config, {})
    with (tmp_path / "scorers" / "clip" / "open_clip_model.safetensors").open("ab") as weights:
        weights.write(b"\0")
    assert score.identity(config, {}) != before
