#!/bin/sh
# Builds the small test kernels into the directory given: build.sh OUT. Needs gcc and binutils for x86, nothing else.
set -e
out=${1:?usage: build.sh OUT}
src=$(dirname "$0")
mkdir -p "$out"
flags="-m32 -march=i486 -mno-sse -ffreestanding -fno-pic -fno-pie -fno-stack-protector -fcf-protection=none -O1 -Wall -Wextra -nostdlib -static"
link="-Wl,-T,$src/kernel32.ld -Wl,--build-id=none -Wl,-z,noexecstack -Wl,--no-warn-rwx-segments -no-pie"
# Page-aligned modules and memory information asked for; nothing asked for; load addresses in the header of a flat binary.
gcc $flags $link -o "$out/kernel32.elf" "$src/boot32.S" "$src/kernel32.c"
gcc $flags $link -DFLAGS=0 -o "$out/kernel32-noflags.elf" "$src/boot32.S" "$src/kernel32.c"
gcc $flags $link -DAOUT -DFLAGS=0 -o "$out/kernel32-aout.elf" "$src/boot32.S" "$src/kernel32.c"
objcopy -O binary "$out/kernel32-aout.elf" "$out/kernel32-aout.bin"
# A 64-bit ELF, and the same in a 32-bit ELF, for loaders that take no other.
gcc -m64 -nostdlib -static -no-pie -Wl,-T,"$src/kernel32.ld" -Wl,--build-id=none -Wl,--no-warn-rwx-segments -o "$out/kernel64.elf" "$src/kernel64.S"
objcopy -O elf32-i386 "$out/kernel64.elf" "$out/kernel64-elf32.elf"
