"""The C extension; everything else about the package stands in pyproject.toml.

It is here because pyproject.toml can't glob - each source in core/ and src/shmqueue/_core/ is part
of the extension, and every header there makes it out of date - and can't tell compilers apart.
"""

import subprocess
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DIRECTORIES = ("core", "src/shmqueue/_core")


class BuildExt(build_ext):
    """Links with GCC's link-time optimization, which takes about 20 ns off a put and a get. Clang's needs
    a linker that it can't be relied on to find."""

    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_so[0]
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
        if "Free Software Foundation" in said.stdout:
            for extension in self.extensions:
                extension.extra_compile_args.append("-flto")
                extension.extra_link_args.append("-flto")
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        Extension(
            "shmqueue._core",
            sources=sorted(path for each in DIRECTORIES for path in glob(f"{each}/*.c")),
            depends=sorted(path for each in DIRECTORIES for path in glob(f"{each}/*.h")),
            include_dirs=["core"],
            extra_compile_args=[
                "-std=c11", "-O3", "-fno-plt", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"
            ],
            extra_link_args=["-O3", "-pthread"],
        )
    ],
)  # fmt: skip
