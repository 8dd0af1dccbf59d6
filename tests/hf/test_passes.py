"""A pass of an attached model: threads, inner models, masks, `generate`, `generate_batch`, offload."""

import threading

import pytest
import torch
from tiny_models import TOP_K, VOCABULARY, tiny_model
from transformers import ContinuousBatchingConfig, StoppingCriteria

from xshare_trtllm import RouterSpec, XShareConfig, route
from xshare_trtllm.hf import attach
from xshare_trtllm.hf.routers import find_routers

TIGHT = XShareConfig(TOP_K + 1)


def tokens(batch, length, seed=1):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products do not gain from a second thread, and wait for it where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    with torch.no_grad():
        model = tiny_model("qwen3_moe")
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if "gate.weight" in name else 0.2)
        yield model


def continuation(model, prompts):
    return model.generate(prompts, max_new_tokens=8, min_new_tokens=8, do_sample=False)


def test_threads_do_not_see_each_other(model):
    prompts = {batch: tokens(batch, 12, seed=batch) for batch in (2, 3, 8)}
    answers, errors = {batch: [] for batch in prompts}, []
    with attach(model, TIGHT) as attached:
        alone = {batch: continuation(model, prompt) for batch, prompt in prompts.items()}
        steps = attached.stats[0].steps
        assert steps == 3 * 7

        def serve(batch):
            try:
                for _ in range(4):
                    answers[batch].append(continuation(model, prompts[batch]))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=serve, args=(batch,)) for batch in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert attached.stats[0].steps == steps + 4 * steps
    for batch, expected in alone.items():
        assert all(torch.equal(answer, expected) for answer in answers[batch]), batch


def test_the_inner_model_is_a_pass_of_its_own(model):
    prompt, step, other = tokens(8, 12), tokens(8, 1), tokens(2, 4)
    own = model.model(input_ids=prompt).last_hidden_state
    with attach(model, TIGHT) as attached:
        assert torch.equal(model.model(input_ids=prompt).last_hidden_state, own)
        model(step)
        model.model(input_ids=other)
        assert [layer.steps for layer in attached.stats] == [1, 1]
        limited = model.model(input_ids=step).last_hidden_state
        assert [layer.rows for layer in attached.stats] == [8, 8]
    assert not torch.equal(limited, model.model(input_ids=step).last_hidden_state)


def test_a_block_called_by_itself_keeps_its_own_routing(model):
    block, hidden = model.model.layers[0].mlp, torch.randn(8, 1, 32)
    own = block(hidden)
    with attach(model, TIGHT) as attached:
        assert torch.equal(block(hidden), own)
        assert attached.stats[0].steps == 0


def test_a_pass_that_fails_leaves_nothing_behind(model):
    with attach(model, TIGHT) as attached:
        with pytest.raises(IndexError):
            model(torch.full((2, 1), VOCABULARY + 7))
        model(tokens(3, 1))
        assert attached.stats[0].rows == 3


def test_masks_by_position_and_in_front_of_a_static_cache(model):
    step = tokens(4, 1)
    mask = torch.tensor([[1], [1], [0], [1]])
    with attach(model, TIGHT) as attached:
        model(step, mask)
        assert attached.stats[0].rows == 3
        attached.reset_stats()
        cache = model(tokens(4, 5), use_cache=True).cache
        ahead = torch.zeros(4, 20, dtype=torch.long)
        ahead[:, :6] = 1
        model(step, attention_mask=ahead, cache=cache)
        assert attached.stats[0].rows == 4


class Ends(StoppingCriteria):
    """Sequence `b` ends after `lengths[b]` new tokens."""

    def __init__(self, prompt, lengths):
        self.ends = prompt + torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


def test_what_has_ended_in_generate_is_padding(model):
    prompts, lengths = tokens(4, 6), [2, 9, 5, 9]
    with attach(model, TIGHT) as attached:
        model.generate(prompts, max_new_tokens=9, do_sample=False, stopping_criteria=[Ends(6, lengths)])
        # Step i feeds new token number i of the sequences that go on after it.
        rows = sum(sum(length > step for length in lengths) for step in range(1, 9))
        assert attached.stats[0].steps == 8 and attached.stats[0].rows * 8 == rows
        attached.reset_stats()
        model(tokens(4, 1))
        assert attached.stats[0].rows == 4, "the next pass has nothing to do with that generate"
    assert "generate" not in vars(model) and "_get_stopping_criteria" not in vars(model)


def test_what_goes_on_is_as_without_the_ended(model):
    """A row that has ended has no say: the others continue as a batch without it would."""
    prompts = tokens(4, 6)
    with attach(model, TIGHT):
        both = model.generate(
            prompts, max_new_tokens=9, do_sample=False, stopping_criteria=[Ends(6, [1, 9, 9, 9])]
        )
        rest = model.generate(prompts[1:], max_new_tokens=9, do_sample=False)
    assert torch.equal(both[1:], rest)


def test_beams_keep_their_rows(model):
    with attach(model, TIGHT) as attached:
        model.generate(tokens(2, 6), max_new_tokens=4, min_new_tokens=4, num_beams=3, do_sample=False)
        assert attached.stats[0].rows == 6


@pytest.mark.parametrize("arguments", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}])
def test_a_generate_that_would_never_be_limited_is_refused(model, arguments):
    prompt = tokens(1, 6)
    with attach(model, TIGHT), pytest.raises(ValueError, match=f"{next(iter(arguments))}.*prefill='shared'"):
        model.generate(prompt, max_new_tokens=3, do_sample=False, **arguments)
    with attach(model, TIGHT, prefill="shared") as attached:
        model.generate(prompt, max_new_tokens=3, do_sample=False, **arguments)
        assert attached.stats[0].steps > 0


def test_continuous_batching_limits_each_decode_step(model):
    """`generate_batch`: prompts of 3 to 9 tokens join while others decode; each sequence is a request."""
    model.set_attn_implementation("eager")
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 5, 7, 9)]
    settings = dict(model.generation_config.to_dict(), max_new_tokens=6, do_sample=False, eos_token_id=-1)
    config = type(model.generation_config)(**settings)
    small = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)

    def serve():
        results = model.generate_batch(prompts, config, small, progress_bar=False).values()
        return sorted(result.generated_tokens for result in results)

    own = serve()
    with attach(model, XShareConfig.off(spec(model))) as attached:
        off = serve()
        before = attached.stats
    with attach(model, TIGHT) as attached:
        limited = serve()
        after = attached.stats
    assert own == off and [len(text) for text in limited] == [6] * 4
    assert before[0].steps == after[0].steps >= 5
    assert after[0].experts_after < before[0].experts_after


def test_packed_rows(model):
    """Two sequences of one token decode, one of three is exempt, two rows behind them are padding."""
    rows = tokens(1, 7)
    starts = torch.tensor([0, 1, 4, 5], dtype=torch.int32)
    with attach(model, TIGHT) as attached:
        model(rows, cu_seq_lens_q=starts, use_cache=False)
        assert attached.stats[0].rows == 5
        attached.prefill = "stepwise"
        with pytest.raises(ValueError, match="packed sequences"):
            model(rows, cu_seq_lens_q=starts, use_cache=False)


def test_offloaded_routers_are_attached_through_their_hooks(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    step = tokens(8, 1)
    with attach(model, TIGHT):
        expected = model(step).logits
    own = model(step).logits
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    before = [vars(router)["forward"] for router in find_routers(model)]
    with attach(model, TIGHT):
        torch.testing.assert_close(model(step).logits, expected)
    assert [vars(router)["forward"] for router in find_routers(model)] == before
    assert torch.equal(model(step).logits, own)


def test_routers_that_are_not_called_are_an_error(model):
    """A kernel that routes by itself leaves the routers out."""
    block = model.model.layers[1].mlp
    with attach(model, TIGHT):
        block.forward = lambda hidden: hidden
        with pytest.raises(RuntimeError, match="1 of 2 routers were called: something replaces"):
            model(tokens(2, 1))


def test_another_output_is_an_error(model):
    router = find_routers(model)[0]
    own = router.forward
    router.forward = lambda hidden: own(hidden)[1:]
    with (
        attach(model, TIGHT),
        pytest.raises(RuntimeError, match="TopKRouter returns 2 values, not the 3"),
    ):
        model(tokens(2, 1))


def test_the_model_decides_its_ties_where_nothing_is_limited(model):
    """bf16 logits of 128 experts are often equal; a stable lower id is XShare's rule, not the model's."""
    router = find_routers(model)[0]
    torch.manual_seed(0)
    logits = torch.randn(4096, 128).bfloat16()
    ours = route(logits, RouterSpec(128, 8, "softmax_renorm"), XShareConfig(128)).expert_ids.long()
    theirs = logits.float().softmax(-1).topk(8).indices
    differs = (ours.sort().values != theirs.sort().values).any(dim=-1)
    assert differs.any(), "no tie was decided differently: the test shows nothing"
    with torch.no_grad():
        router.weight.copy_(router.weight[:1].expand_as(router.weight))  # all experts tie, in every row
        step = tokens(8, 1)
        own = model(step).logits
        for config in (XShareConfig.off(spec(model)), XShareConfig(TOP_K, max_rows=7)):
            with attach(model, config):
                assert torch.equal(model(step).logits, own)


def test_a_banned_expert_changes_no_text_without_a_limit():
    """gpt-oss with a router bias of -inf for one expert."""
    with torch.no_grad():
        model = tiny_model("gpt_oss")
        for router in find_routers(model):
            router.weight.normal_(std=0.5)
            router.bias[3] = -torch.inf
        prompts = tokens(4, 6)
        own = continuation(model, prompts)
        with attach(model, XShareConfig(16)):
            assert torch.equal(continuation(model, prompts), own)
        with attach(model, TIGHT) as attached:
            step = model(tokens(8, 1)).logits
        assert torch.isfinite(step).all() and attached.stats[0].rows == 8


def spec(model):
    return RouterSpec.from_hf_config(model.config)
