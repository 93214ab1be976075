"""Break tl-trainer on purpose and count what is lost: scripts/stress/run."""
