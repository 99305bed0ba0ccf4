"""The chat templates that go by a name: how each writes a conversation. Jinja text, as tokenizers carry it.

Each ends a generation prompt without a space: the space belongs to the first word of the answer.
"""

_BOS = "{{ bos_token | default('', true) }}"
_EOS = "(eos_token | default('', true))"

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_ZEPHYR = (
    "{% for message in messages %}"
    f"{{{{ '<|' + message['role'] + '|>\\n' + message['content'] + {_EOS} + '\\n' }}}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('after a system message, user and assistant must take turns') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    f"{_BOS}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}"
    f"{{{{ ' ' + message['content'].strip() + ' ' + {_EOS} }}}}"
    "{% endif %}{% endfor %}"
)

_LLAMA3 = (
    f"{_BOS}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'].strip() }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

# The words are Stanford Alpaca's; an input stands in the user's message below this line (see rendering).
ALPACA_INPUT = "\n\n### Input:\n"
_ALPACA = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'].strip() + '\\n\\n' }}{% set turns = messages[1:] %}"
    "{% elif '\\n\\n### Input:\\n' in messages[0]['content'] %}"
    "{{ 'Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\\n\\n' }}{% set turns = messages %}"
    "{% else %}"
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\\n\\n' }}{% set turns = messages %}"
    "{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'assistant' %}"
    f"{{{{ '### Response:\\n' + message['content'].strip() + {_EOS} + '\\n\\n' }}}}"
    "{% else %}{{ '### Instruction:\\n' + message['content'].strip() + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

_USR_BOT = (
    "{% for message in messages %}"
    "{{ {'system': '<sys>', 'user': '<usr>', 'assistant': '<bot>'}[message['role']] }}"
    "{{ ' ' + message['content'].strip() }}"
    f"{{% if message['role'] == 'assistant' %}}{{{{ {_EOS} }}}}{{% endif %}}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
)

_BEGINS_ITSELF = {"llama2": _LLAMA2, "llama3": _LLAMA3}
_BEGINS_AS_TEXT_DOES = {"alpaca": _ALPACA, "chatml": _CHATML, "usr_bot": _USR_BOT, "zephyr": _ZEPHYR}
NAMES = tuple(sorted(_BEGINS_ITSELF | _BEGINS_AS_TEXT_DOES))


def named_template(name: str, text_begins_with_bos: bool) -> str:
    """The text of a template by its name; it begins with BOS where the tokenizer begins every text so."""
    if name in _BEGINS_ITSELF:
        return _BEGINS_ITSELF[name]
    return (_BOS if text_begins_with_bos else "") + _BEGINS_AS_TEXT_DOES[name]
