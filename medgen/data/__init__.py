"""From files on disk to slices in memory: phantoms, the slice store, resizing, single image files, summaries.

Import the module you need (`medgen.data.store`, `medgen.data.phantoms`, ...); this package imports nothing by itself."""
