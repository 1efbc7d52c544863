"""`python -m tomevit`, the same as `tomevit`."""

from tomevit.cli import main

main()
