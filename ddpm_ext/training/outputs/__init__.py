"""What a run tells and leaves: log and plot, grids, scores, pipelines, uploads."""

__all__: list[str] = []
