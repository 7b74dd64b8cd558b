"""The load generator: a client of any OpenAI-compatible server, open or closed loop (`python -m systems.common.load`).

docs/load.md is the manual. Modules, from the ground up:

* `wire`: bytes from a server to body pieces and server-sent events, pure;
* `connection`: one request over one connection, every piece stamped as it comes in; connections are kept for reuse;
* `answer`: from the events of one answer to token times and a verdict, pure;
* `prompts` and `api`: what is sent: prompts of an exact number of tokens, and request bodies;
* `plan` and `options`: which requests, from a file, a declaration or flags;
* `measurement` and `drive`: sends them at their times, or so many at once, and notes what came back and its own lag;
* `results`: the records, metrics and files of a run; `report` shows them; `cli` is the command;
* `mock`, `mock_server`: a server with known latencies, to test clients with (`python -m systems.common.load.mock`).
"""
