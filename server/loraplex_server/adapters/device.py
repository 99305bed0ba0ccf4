"""The adapters inside the served PeftModel: put in through peft, made active by set_adapter, taken out by deletion.

Owns the model's adapters; called by the engine's thread alone, between two forwards.
"""

from itertools import count, groupby

from peft import LoraModel, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.modeling_utils import PreTrainedModel

from loraplex_server.adapters.host import HostAdapter
from loraplex_server.engine.batch import Batch
from loraplex_server.engine.errors import AdapterRefused
from loraplex_server.engine.lora import Routing, Segment


class DeviceAdapters:
    """Adapters of one model by key. ``model`` is what a forward calls: the base, whose layers peft replaces in place.

    Not peft's own wrapper: its forward reads the configuration of the adapter it holds for the active one, which may
    be gone while the base answers.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.model = base
        self._peft: PeftModelForCausalLM | None = None  # until the first adapter comes
        self._names: dict[str, str] = {}  # key -> peft's name for it
        self._numbers = count()
        self._active: str | None = None  # peft's name; None: no adapter
        self._routing = Routing()

    def install(self, adapter: HostAdapter) -> None:
        """Put an adapter on the device.

        Raises:
            AdapterRefused: peft did not take every tensor to its place; nothing of the adapter stays.
        """
        name = f"adapter_{next(self._numbers)}"
        self._names[adapter.key] = name
        try:
            self._inject(name, adapter)
            self._check_whole(name, adapter)
        except Exception as error:  # whatever it was, nothing of the adapter may stay in the base
            self.remove(adapter.key)
            raise AdapterRefused(f"peft cannot use it on this base: {error}") from error

    def remove(self, key: str) -> None:
        """Take an adapter off the device; its memory is free when this returns."""
        name = self._names.pop(key)
        self._deactivate()  # peft would make another adapter active in place of a deleted one
        if self._peft and name in self._peft.peft_config:
            self._peft.delete_adapter(name)
        else:
            self._take_out(name)
        self._deactivate()

    def route(self, batch: Batch) -> None:
        """Make the next forward give each row its adapter: by set_adapter for a step of one, else row by row."""
        if len(batch.adapters) == 1:
            self._routing.mixed = False
            self.activate(*batch.adapters)
            return
        self._routing.mix(self._segments(batch, sampled=False), self._segments(batch, sampled=True))

    def _segments(self, batch: Batch, sampled: bool) -> list[Segment]:
        """Who owns which tokens of the step, or which of those that are sampled from; None for the base's."""
        segments, first = [], 0
        for adapter, rows in groupby(batch.rows, key=lambda row: row.request.adapter):
            tokens = sum(row.samples if sampled else row.tokens for row in rows)
            segments.append((self._names.get(adapter or ""), first, first + tokens))
            first += tokens
        return segments

    def activate(self, key: str | None) -> None:
        """Make one adapter, or none, the active one: the swap."""
        name = None if key is None else self._names[key]
        if name == self._active or self._peft is None:
            return
        if name is None:
            self._deactivate()
        else:
            self._peft.set_adapter(name, inference_mode=True)
            self._active = name

    def _deactivate(self) -> None:
        if self._peft:
            _tuner(self._peft).set_adapter([], inference_mode=True)
        self._active = None

    def _take_out(self, name: str) -> None:
        """Undo half an injection: peft replaces layer after layer, and leaves those when it gives up on the next."""
        for path, layer in list(self.model.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.delete_adapter(name)
                if self._peft is None:
                    self.model.set_submodule(path, layer.get_base_layer())

    def _inject(self, name: str, adapter: HostAdapter) -> None:
        if self._peft:
            self._peft.add_adapter(name, adapter.config, low_cpu_mem_usage=True)
        else:
            self._peft = PeftModelForCausalLM(self.model, adapter.config, name, low_cpu_mem_usage=True)
        tensors = {key: tensor.to(self.model.device) for key, tensor in adapter.tensors.items()}
        set_peft_model_state_dict(self._peft, tensors, adapter_name=name, low_cpu_mem_usage=True)
        _tuner(self._peft)._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=True)  # as peft's loader does
        self._peft.eval()
        self._routing.attach(self.model)
        self._deactivate()

    def _check_whole(self, name: str, adapter: HostAdapter) -> None:
        """Every tensor of the file is in the model, and the model has no LoRA tensor that the file lacks."""
        held = get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        if held.keys() != adapter.tensors.keys():
            odd = sorted(held.keys() ^ adapter.tensors.keys())
            raise AdapterRefused(f"{len(odd)} tensors have no counterpart, the first is {odd[0]!r}")
        for key, tensor in adapter.tensors.items():
            if held[key].is_meta or held[key].shape != tensor.shape:
                raise AdapterRefused(f"tensor {key!r} was not taken: expected shape {tuple(tensor.shape)}")


def _tuner(model: PeftModelForCausalLM) -> LoraModel:
    tuner = model.base_model
    assert isinstance(tuner, LoraModel)  # only LoRA adapters get here
    return tuner
