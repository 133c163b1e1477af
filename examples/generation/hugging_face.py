"""The equilibrium transformer as a model of Hugging Face transformers, so that `generate` samples from it.

To transformers the equilibrium is one layer: its cache holds keys and values of past tokens at their equilibrium.

    python examples/generation/hugging_face.py
"""

from __future__ import annotations

from typing import Any

import model_torch
import torch
from model import HIDDEN, LENGTH, WIDTH, WORDS, weights
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# The field of the output, and the argument, that carry the cache: `past_key_values` before transformers 5.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class EquilibriumConfig(PretrainedConfig):
    """Sizes of the model. To transformers it has one layer, whose cache holds keys and values at the equilibrium."""

    model_type = "equilibrium"

    def __init__(self, length: int = LENGTH, width: int = WIDTH, hidden: int = HIDDEN, **others: Any) -> None:
        self.length, self.width, self.hidden = length, width, hidden
        self.num_hidden_layers = 1
        super().__init__(**({"vocab_size": WORDS, "max_position_embeddings": length} | others))


class EquilibriumForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model whose `forward` solves for the tokens that are not in the cache yet."""

    config_class = EquilibriumConfig

    def __init__(self, config: EquilibriumConfig, **settings: Any) -> None:
        super().__init__(config)
        drawn = weights(0, config.length, config.width, config.hidden)
        self.p = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(torch.tensor(v)) for name, v in drawn.items()})
        self.names, self.settings = list(drawn), settings
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the weights that `__init__` has drawn."""

    def load(self, given: dict[str, Any]) -> None:
        """Take the weights of either framework, as `model.weights` names them."""
        with torch.no_grad():
            for name in self.names:
                self.p[name.replace(".", "_")].copy_(torch.as_tensor(given[name]))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits `(batch, count, words)` for `input_ids` `(batch, count)`, and the cache with these tokens.

        Raises:
            ValueError: there are more tokens than positions, or the mask hides some.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "attention_mask must be all ones: the model does not have a mask for padding (got zeros). "
                "Generate for prompts of one length."
            )
        given = cache if cache is not None else past_key_values
        model = model_torch.Model({name: self.p[name.replace(".", "_")] for name in self.names}, **self.settings)
        own = model.cache(len(input_ids))
        given = DynamicCache() if given is None else given
        if past := given.get_seq_length():
            own.keys[:, :, :past], own.values[:, :, :past] = given.layers[0].keys, given.layers[0].values
            own.used = past
        logits, _ = model.extend(input_ids, own)
        given.update(own.keys[:, :, past : own.used], own.values[:, :, past : own.used], 0)
        return CausalLMOutputWithPast(logits=logits, **({CACHE: given} if use_cache is not False else {}))


def main() -> None:
    """Generate from random weights, greedily and by sampling."""
    language = EquilibriumForCausalLM(EquilibriumConfig()).eval()
    prompt = torch.arange(8)[None]
    print("greedy:", language.generate(prompt, max_new_tokens=16, do_sample=False)[0].tolist())
    print("sampled:", language.generate(prompt, max_new_tokens=16, do_sample=True, top_k=10)[0].tolist())


if __name__ == "__main__":
    main()
