"""Cardiac maps and their contours: DICOM and contour files to images, polygons and label masks; called by medgen/data.

Import the module you need (`medgen.cardiac.tree`, `medgen.cardiac.rasterise`, ...); this package imports nothing by itself."""
