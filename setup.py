"""The C extension; everything else about the package stands in pyproject.toml.

It is here because pyproject.toml can't glob: each source in core/ and src/shmqueue/_core/ is part
of the extension, and every header there makes it out of date.
"""

from glob import glob

from setuptools import Extension, setup

DIRECTORIES = ("core", "src/shmqueue/_core")

setup(
    ext_modules=[
        Extension(
            "shmqueue._core",
            sources=sorted(path for each in DIRECTORIES for path in glob(f"{each}/*.c")),
            depends=sorted(path for each in DIRECTORIES for path in glob(f"{each}/*.h")),
            include_dirs=["core"],
            extra_compile_args=["-std=c11", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra"],
        )
    ]
)
