"""Jobs in processes that have the libraries already: starting one takes 0.15 s instead of 0.4 to 1.5 s of processor time.

Most jobs on this machine are short, and spent more time importing pydantic, pyarrow, pandas and matplotlib than on their work.
So while Snakemake runs there is one process, the server, that imports these libraries once and forks itself for every job.

    Snakemake -> sh -> python -m harness.warm python -m harness.series ...     (the client: waits, passes signals on)
              -> server -> fork: harness.series                                (the job, with the client's files and folder)

* Only libraries are imported beforehand, none of our code: a job runs what is on the disk when it begins.
* A client whose server is not there runs the command itself. Clusters, other hosts, measured backends, conda and systems
  other than Linux do without.
* A job ends when its client or Snakemake does, however these end; when the server does, as when any parent does.

`FIVEFOLD_COLD=1` in the environment turns it off.
"""
