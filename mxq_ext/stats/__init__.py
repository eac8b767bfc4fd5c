"""Calibration: model + tokens -> Stats."""
