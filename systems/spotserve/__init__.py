"""SpotServe (ASPLOS '24): serving generative LLMs on preemptible instances. README.md is the paper in a page."""
