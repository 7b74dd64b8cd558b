"""An OpenAI-compatible HTTP server over the engine: `python -m systems.common.serve` (docs/serving.md).

Rooms, in reading order:

* `config`: what a user sets, on the command line or in a YAML file.
* `messages`: what the HTTP process and the engine process say to each other. `process`: the pipe between them.
* `loading`, `core`: the engine process: a warm engine from the settings; its loop, which takes jobs and reports tokens.
* `streams`: the HTTP process's view of that loop: one stream of tokens per prompt.
* `tokenizers`, `text`: text to tokens; tokens to text piece by piece, stop strings.
* `http`: just enough of ASGI. `protocol`: bodies of requests, checked; `answers`: bodies of answers.
* `answering`: from a request to jobs; `delivery`: from their streams to the answer, in one or in pieces.
* `served`: the model's name, its tokenizer, its adapters and who uses them. `metrics`: counters as Prometheus text.
* `app`: the paths. `silence`: connections that never ask. `server`: socket, signals, drain, exit code.
"""
