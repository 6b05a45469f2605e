"""Measured runs beside simulated ones: replay of single requests, and fixed-concurrency operating points.

    measured.py  reads a run        replay.py   simulates it, compares      points.py  fixed concurrency
    show.py      tables, JSON       plots.py    measured against simulated
"""
