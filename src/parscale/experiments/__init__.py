"""One short file per claim; each runs trainings and returns plain rows. `report.py` draws them."""
