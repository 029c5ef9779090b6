"""OpenVLA's published forward and `predict_action`, in a straightforward way: timm's modules, transformers' Llama.

From the checkpoint's own tensors and names, not from a model folder; shares no code with the loader but the layout's
file names.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from vla_spec.engines.nets.openvla.timm_models import load_timm


class PublishedOpenVLA:
    """A checkpoint folder as the field runs it, in fp32."""

    def __init__(self, folder: Path):
        from transformers import LlamaConfig, LlamaForCausalLM

        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.processor = json.loads((folder / "preprocessor_config.json").read_text())
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self.tensors = {}
        for file in sorted(set(index["weight_map"].values())):
            self.tensors |= {name: tensor.float() for name, tensor in load_file(folder / file).items()}
        text = {k: v for k, v in self.config["text_config"].items() if k not in ("torch_dtype", "model_type")}
        self.llama = LlamaForCausalLM(LlamaConfig(**text, attn_implementation="eager")).eval()
        language = {k.removeprefix("language_model."): v for k, v in self.tensors.items() if "language" in k}
        self.llama.load_state_dict(language, strict=True)
        timm = load_timm()
        self.featurizers = []
        for i, prefix in enumerate(("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")):
            model = timm.create_model(
                self.config["timm_model_ids"][i], pretrained=False, num_classes=0,
                img_size=self.config["image_sizes"][i], **self.config["timm_overrides"][i],
            )  # fmt: skip
            state = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
            model.load_state_dict({k.replace("scale_factor", "gamma"): v for k, v in state.items()}, strict=True)
            self.featurizers.append(model.eval())

    def pixel_values(self, picture):
        """uint8 [h, w, 3] -> [1, 6, s, s], by timm's own transform with its resize made as the strategy says."""
        from torchvision.transforms import InterpolationMode, Resize
        from torchvision.transforms.functional import pad

        load_timm()
        from timm.data import create_transform

        strategy, stacked = self.processor["image_resize_strategy"], []
        image = Image.fromarray(picture)
        if strategy == "letterbox":
            (w, h), longest = image.size, max(image.size)
            x, y = int((longest - w) / 2), int((longest - h) / 2)
            image = pad(image, (x, y, x, y), fill=tuple(int(v * 255) for v in self.processor["means"][-1]))
        for i, shape in enumerate(self.processor["input_sizes"]):
            transform = create_transform(
                input_size=tuple(shape), interpolation=self.processor["interpolations"][i],
                mean=self.processor["means"][i], std=self.processor["stds"][i], crop_pct=1.0, crop_mode="center",
                is_training=False,
            )  # fmt: skip
            if strategy == "resize-naive":
                transform.transforms[0] = Resize(
                    tuple(shape[1:]), InterpolationMode(self.processor["interpolations"][i])
                )
            stacked.append(transform(image))
        return torch.vstack(stacked)[None]

    def prompt_ids(self, instruction):
        """As the processor and `predict_action` make them."""
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(self.folder / "tokenizer.json"))
        ids = tokenizer(f"In: What action should the robot take to {instruction.lower()}?\nOut:").input_ids
        empty = tokenizer.convert_tokens_to_ids("\u2581")
        return torch.tensor([ids if ids[-1] == empty else [*ids, empty]])

    @torch.inference_mode()
    def embeds(self, picture, instruction):
        """Multimodal embeddings [1, p, D]: patches behind the first token."""
        pixels, t = self.pixel_values(picture), self.tensors
        features = [
            model.get_intermediate_layers(part, n=[len(model.blocks) - 2])[0]
            for model, part in zip(self.featurizers, torch.split(pixels, [3, 3], 1), strict=True)
        ]
        x = torch.cat(features, 2)
        for i in (1, 2, 3):
            x = functional.linear(x, t[f"projector.fc{i}.weight"], t[f"projector.fc{i}.bias"])
            x = functional.gelu(x) if i < 3 else x
        words = self.llama.get_input_embeddings()(self.prompt_ids(instruction))
        return torch.cat((words[:, :1], x, words[:, 1:]), 1)

    @torch.inference_mode()
    def forward(self, embeds, ids=()):
        """Logits [rows, text vocabulary] and last hidden states [rows, D] of a prompt and text ids behind it."""
        if len(ids):
            embeds = torch.cat((embeds, self.llama.get_input_embeddings()(torch.tensor([list(ids)]))), 1)
        out = self.llama(inputs_embeds=embeds, output_hidden_states=True)
        return out.logits[0], out.hidden_states[-1][0]

    def first_action_id(self):
        vocab = self.config["text_config"]["vocab_size"] - self.config["pad_to_multiple_of"]
        return vocab - self.config["n_action_bins"]

    def generate(self, picture, instruction, num_tokens):
        """Greedy text ids, restricted to action tokens: nothing else is ever learnt at these positions."""
        first, ids = self.first_action_id(), []
        embeds = self.embeds(picture, instruction)
        for _ in range(num_tokens):
            row = self.forward(embeds, ids)[0][-1, first : first + self.config["n_action_bins"]]
            ids.append(first + int(row.argmax()))
        return ids

    def action(self, ids, statistics):
        """Text ids to an un-normalised action, with the published arithmetic."""
        bins = np.linspace(-1, 1, self.config["n_action_bins"])
        centres = (bins[:-1] + bins[1:]) / 2.0
        vocab = self.config["text_config"]["vocab_size"] - self.config["pad_to_multiple_of"]
        index = np.clip(vocab - np.array(ids) - 1, 0, len(centres) - 1)
        low, high = np.array(statistics["q01"]), np.array(statistics["q99"])
        return np.where(statistics["mask"], 0.5 * (centres[index] + 1) * (high - low) + low, centres[index])


class PublishedDrafter:
    """Spec-VLA's head (class MMModel of its code): transformers' Llama layer without its first norm, in fp32."""

    def __init__(self, folder: Path, target: PublishedOpenVLA):
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config = json.loads((folder / "config.json").read_text())
        config = LlamaConfig(**{k: v for k, v in config.items() if k not in ("torch_dtype", "rope_scaling")})
        config._attn_implementation = "eager"
        file = folder / "model.safetensors"
        state = load_file(file) if file.is_file() else torch.load(folder / "pytorch_model.bin", weights_only=True)
        state = {name: tensor.float() for name, tensor in state.items()}
        self.layer, self.rotary = LlamaDecoderLayer(config, 0).eval(), LlamaRotaryEmbedding(config)
        self.layer.input_layernorm = torch.nn.Identity()
        layer = {k.removeprefix("layers.0."): v for k, v in state.items() if k.startswith("layers.0.")}
        self.layer.load_state_dict(layer, strict=True)
        self.fc, self.bias = state["fc.weight"], state.get("fc.bias")
        self.target = target

    @torch.inference_mode()
    def rows(self, embeds, hidden):
        """embeds [n, D] of the rows after hidden [n, D] -> what stands in for the next hidden states [n, D]."""
        n = len(hidden)
        x = functional.linear(torch.cat((embeds, hidden), -1), self.fc, self.bias)[None]
        mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
        rotation = self.rotary(x, torch.arange(n)[None])
        out = self.layer(x, attention_mask=mask, position_ids=torch.arange(n)[None], position_embeddings=rotation)
        return (out[0] if isinstance(out, tuple) else out)[0]

    @torch.inference_mode()
    def log_probs(self, prompt, hidden, ids):
        """After a prompt, hidden states of its rows and text ids, the last of which were only drafted: [V]."""
        first = self.target.first_action_id()
        tokens = self.target.llama.get_input_embeddings()(torch.tensor(list(ids)))
        embeds = torch.cat((prompt[0, 1:], tokens))
        while len(hidden) < len(embeds):
            hidden = torch.cat((hidden, self.rows(embeds[: len(hidden)], hidden)[-1:]))
        logits = self.target.llama.lm_head(self.rows(embeds, hidden)[-1])
        return logits[first : first + self.target.config["n_action_bins"]].log_softmax(-1).numpy()
