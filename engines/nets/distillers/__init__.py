"""One file per drafter network that can be distilled, named as the drafter: ``build``, ``loss``, ``export``."""
