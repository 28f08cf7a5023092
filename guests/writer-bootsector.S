/*
 * A guest in 512 bytes that fills its root disk: it writes one sector in every 64 KiB, and each
 * allocates a cluster of a qcow2 overlay. It writes through the BIOS, which waits for a paused disk
 * without a timeout.
 *
 * On COM1 it prints "BOOTSECTOR-OK", then "W" for each sector written, then "END" when the BIOS
 * refuses a write: at the end of the disk, or at a disk error.
 *
 *   as --32 writer-bootsector.S -o b.o
 *   ld -m elf_i386 -Ttext 0x7c00 --oformat binary b.o -o writer-bootsector.bin
 */
        .set    COM1, 0x3f8
        .set    STEP, 128               /* sectors */

        .code16
        .globl  _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x7c00, %sp
        movb    %dl, drive              /* the BIOS passes the boot disk */
        movw    $banner, %si
        call    puts

1:      movw    $0x4300, %ax            /* extended write, no verify */
        movb    drive, %dl
        movw    $packet, %si
        int     $0x13
        jc      2f
        movw    $wrote, %si
        call    puts
        addl    $STEP, sector
        jmp     1b

2:      movw    $end, %si
        call    puts
3:      hlt
        jmp     3b

/* Prints the zero-terminated text at %si. */
puts:   movw    $COM1, %dx
4:      lodsb
        testb   %al, %al
        jz      5f
        outb    %al, %dx
        jmp     4b
5:      ret

drive:  .byte   0
packet: .byte   16, 0                   /* size of the packet */
        .word   1                       /* one sector */
        .word   0x7c00, 0               /* source: offset, segment */
sector: .long   STEP, 0
banner: .asciz  "BOOTSECTOR-OK\n"
wrote:  .asciz  "W\n"
end:    .asciz  "END\n"
        .org    510
        .word   0xaa55
