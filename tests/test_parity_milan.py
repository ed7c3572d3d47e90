"""MILAN gives the numbers of its official code: the method, its CLIP teacher, and how its masks are drawn."""

from types import SimpleNamespace

import torch
from einops import rearrange
from torch import nn

from models.mim.hide import Skip
from models.mim.loss import cosine, over_all
from models.mim.milan import MILAN, AttentionMasker, PromptDecoder
from models.targets.frozen import Teacher
from models.targets.load import load_teacher
from models.targets.target import Target
from models.targets.tower import Tokens
from tests.official import Given, check, check_gradients, enter, golden, losses_with_gradients, vit


class Told(Target):
    """A teacher that gives the fixture's features."""

    def __init__(self, features, unit, grid):
        super().__init__()
        self.unit, self.dim = unit, features.shape[2]
        self.tokens = Tokens(features[:, 1:].unflatten(1, grid), features[:, :1])

    def look(self, images, attention=False):
        return self.tokens


class Looks(Teacher):
    """A teacher that attends as it is told."""

    def __init__(self, attention):
        nn.Module.__init__(self)
        self.unit, self.tower, self.attention = 16, SimpleNamespace(attends=True), attention

    def look(self, images, attention=False):
        return Tokens(self.attention[..., None], self.attention[:, :0, :1], self.attention)


def test_milan():
    facts, state, given, expected = golden("milan")
    args, images = facts["constructor"]["args"], given["imgs"]
    patch = args["patch_size"]
    grid = [side // patch for side in images.shape[-2:]]
    encoder = vit(args, position="sincos")
    target = Told(given["clip_features"], patch, grid)
    size = args["decoder_depth"], args["decoder_embed_dim"], args["decoder_num_heads"], args.get("mlp_ratio", 4.0)
    masker = Given(expected["mask"].unflatten(1, grid), patch)
    mim = MILAN(masker, Skip(encoder), PromptDecoder(encoder, target, *size), target, cosine, over_all).eval()
    enter(mim, state)
    loss = mim({"image": images})["loss"]
    for key in losses_with_gradients(facts).values():
        check_gradients(facts, key, loss, mim, "milan", state)
    mask = masker(images)
    features = mim.hide(images, mask)
    n = expected["latent"].shape[1] - 1
    kept = expected["ids_restore"].argsort(1)[:, :n]
    seen = rearrange(features.maps[-1], "b c h w -> b (h w) c").gather(1, kept[..., None].expand(-1, -1, encoder.width))
    found = {"latent": torch.cat([features.prefix, seen], 1), "loss": loss}
    found["pred"] = mim.head.cells.linear(mim.head.tokens(features, mask))
    torch.testing.assert_close(mim.head(features, mask).flatten(1, 2), found["pred"][:, 1:])
    found["mask"] = mask.cells.flatten(1)
    check(facts, found, expected)


def test_clip_teacher(tmp_path):
    """Fed as MILAN's code feeds it, with images of whatever normalisation."""
    facts, state, given, expected = golden("milan_clip_teacher")
    args = facts["constructor"]["args"]
    torch.save(state, tmp_path / "clip.pth")
    tower = load_teacher(f"clip:{tmp_path / 'clip.pth'}", torch.float32, heads=args["heads"])
    assert (tower.patch, tower.dim) == (args["patch_size"], args["output_dim"]) and tower.attends
    seen = tower(given["imgs"], tower.patch, attention=True)
    features = torch.cat([seen.prefix, seen.cells.flatten(1, 2)], 1)
    check(facts, {"features": features, "importance": seen.attention.flatten(1)}, expected)
    check(facts | {"recommended_atol": {"attention": facts["recommended_atol"]["attention"]}},
          {"attention": seen.attention.flatten(1)}, {"attention": expected["attention"][:, 0, 1:]})  # fmt: skip


def drawn(importance, keep, draws):
    """How often each cell is shown by our masker, in `draws` draws for each row of importance."""
    side = importance.shape[1]
    torch.manual_seed(0)
    attention = importance.repeat_interleave(draws, 0)[:, None]  # (rows * draws, 1, L)
    masker = AttentionMasker(16, 1 - keep / side, Looks(attention))
    cells = masker(torch.zeros(1, 1, 16, 16 * side).expand(len(attention), -1, -1, -1)).cells
    assert (cells.sum((1, 2)) == side - keep).all()
    return (~cells[:, 0]).unflatten(0, (len(importance), draws)).float().mean(1)


def test_cells_are_shown_as_often_as_officially():
    facts, _, given, expected = golden("milan_sampling")
    keep, draws = facts["call"]["keep"], facts["call"]["draws"]
    exact, importance = expected["keep_probability_exact"], given["importance"]
    ours = drawn(importance, keep, draws)
    error = (exact * (1 - exact) / draws).sqrt()  # standard error of a frequency
    assert ((ours - exact).abs() < 4.5 * error).all()
    assert ((ours - expected["keep_frequency"]).abs() < 4.5 * 2**0.5 * error).all()
    first = drawn(importance, 1, draws)  # where one cell is shown, it is the first drawn
    odds = importance / importance.sum(1, keepdim=True)
    assert ((first - odds).abs() < 4.5 * (odds * (1 - odds) / draws).sqrt()).all()
    # what this would not let pass: no attention, sharpened or softened attention, the lowest first
    for wrong in (torch.ones_like(importance), importance**1.2, importance**0.8, 1 / importance):
        assert not ((drawn(wrong, keep, draws) - exact).abs() < 4.5 * error).all()
