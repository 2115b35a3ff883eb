"""The command ``sweep``: the protocol of the paper over one machine or a cluster.

A sweep has *contenders*, the rows of its table: a method, at a budget, on a task. Each has *candidates*, the points of
the grid. Runs with the search seeds choose a candidate for every contender on the validation split; runs of the chosen
ones with the final seeds, on all training images, are what the table reports on the test set.

    arguments.py    what was asked for, as a plan
    grid.py         the points of the grid, as configurations
    contenders.py   the rows of the table and the runs that each needs
    halving.py      which candidate to train how far
    schedule.py     which run is next, from the grid to the last final seed
    driver.py       keeps a pool busy with these runs and tries failed ones again
    pool.py         that pool on Ray
    worker.py       one run, where it takes place
    differences.py  paired intervals and the seeds that a difference needs
    cost.py         what a run of each contender costs, side by side
    results.py      from finished runs to the numbers of the table
    table.py, progress.py, pictures.py, page.py, record.py   show and keep them

The directories of the runs are the whole state of a sweep: everything else is derived from them.
"""
