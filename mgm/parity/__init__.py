"""Compare this package with reference values of the original, folder by folder.

`python -m mgm.parity DIR` looks through DIR for every kind of reference folder it knows, runs
this package's own functions on the stored inputs and compares with the stored results. Sizes,
seeds and cases are read from the folders, never assumed. Each module owns one kind of folder;
`mgm.parity.report` owns the comparison and the table.
"""
