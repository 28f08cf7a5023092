/*
 * A guest that tells a KVM under which Linux runs from one that only opens. It replaces the
 * firmware (-bios): 64 KiB, of which kvm-probe.bin is the first bytes, the reset vector
 * `ea 00 00 00 f0` is at 0xfff0, and the rest is zero.
 *
 * It goes from the reset vector to long mode with paging, uses cmpxchg16b, SSE2 and x87, takes an
 * interrupt of the local APIC's timer and one of the PIT, works for some 10 ms of a real CPU, and
 * ends QEMU by isa-debug-exit at port 0xf4: status 171 is success, 3 an exception. A letter for
 * each step passed goes to port 0xe9.
 *
 * A KVM without VT-x or AMD-V interprets kernel code at a million instructions a second. It lacks
 * cmpxchg16b, SSE and x87, and Linux ends at the first of these.
 *
 *   as --64 kvm-probe.S -o p.o
 *   ld -m elf_x86_64 -Ttext 0xf0000 -e _start --oformat binary p.o -o kvm-probe.bin
 */
        .set    ROM, 0xf0000            # where the image also is, below 1 MiB
        .set    TABLES, 0x10000         # page tables: PML4, PDPT, 4 PDs
        .set    IDT, 0x18000
        .set    STACK, 0x20000
        .set    APIC, 0xfee00000
        .ifndef WORK
        .set    WORK, 20000000
        .endif
        .macro  step letter
        mov     $\letter, %al
        out     %al, $0xe9
        .endm

        .code16
        .globl  _start
_start: cli
        step    'r'
        mov     $0xf000, %ax
        mov     %ax, %ds
        lgdtl   gdtr - ROM
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $8, $protected

        .code32
protected:
        mov     $16, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %fs
        mov     %eax, %gs
        mov     %eax, %ss
        mov     $STACK, %esp
        step    'p'
        # RAM is zero at start. The first 2 MiB and those of the APIC are mapped where they are.
        movl    $TABLES + 0x1003, TABLES
        movl    $TABLES + 0x2003, TABLES + 0x1000
        movl    $TABLES + 0x5003, TABLES + 0x1018
        movl    $0x83, TABLES + 0x2000
        movl    $APIC + 0x93, TABLES + 0x5000 + 0x1f7 * 8
        mov     $0x620, %eax            # PAE, OSFXSR, OSXMMEXCPT
        mov     %eax, %cr4
        mov     $TABLES, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx       # EFER: long mode
        rdmsr
        bts     $8, %eax
        wrmsr
        mov     $0x80000033, %eax       # PG, NE, ET, MP, PE
        mov     %eax, %cr0
        ljmpl   $24, $long

        .code64
long:   step    'l'
        mov     $IDT, %edi
        mov     $34, %ecx
        mov     $exception, %eax
1:      mov     $interrupt, %edx
        cmp     $2, %ecx                # the last two: 32 the PIT, 33 the APIC
        cmovbe  %edx, %eax
        mov     %ax, (%rdi)
        movw    $24, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        mov     %eax, %edx
        shr     $16, %edx
        mov     %dx, 6(%rdi)
        add     $16, %edi
        dec     %ecx
        jnz     1b
        lidt    idtr

        # What KVM's emulator of instructions does not know.
        mov     $1, %eax
        cpuid
        bt      $13, %ecx               # CX16
        jnc     6f
        xor     %eax, %eax
        xor     %edx, %edx
        xor     %ecx, %ecx
        mov     $7, %ebx
        lock cmpxchg16b STACK
        jnz     exception
        cmpl    $7, STACK
        jne     exception
6:      step    'c'
        mov     $0x1234, %eax
        movd    %eax, %xmm0
        pshufd  $0, %xmm0, %xmm1
        paddd   %xmm0, %xmm1
        movd    %xmm1, %eax
        cmp     $0x2468, %eax
        jne     exception
        fninit
        fld1
        fadd    %st(0), %st(0)
        fistpl  STACK
        cmpl    $2, STACK
        jne     exception
        step    's'

        # The timer of the APIC.
        xor     %ebp, %ebp
        mov     $APIC, %ebx
        movl    $0x1ff, 0xf0(%rbx)
        movl    $0xb, 0x3e0(%rbx)
        movl    $33, 0x320(%rbx)
        movl    $100000, 0x380(%rbx)
        sti
2:      hlt
        test    %ebp, %ebp
        jz      2b
        cli
        step    't'

        # The PIT, by the first PIC, through LINT0 of the APIC.
        movl    $0x700, 0x350(%rbx)
        mov     $0x11, %al
        out     %al, $0x20
        mov     $32, %al
        out     %al, $0x21
        mov     $4, %al
        out     %al, $0x21
        mov     $1, %al
        out     %al, $0x21
        mov     $0xfe, %al
        out     %al, $0x21
        mov     $0x30, %al              # counter 0, once, after 1 ms
        out     %al, $0x43
        mov     $0xa9, %al
        out     %al, $0x40
        mov     $0x04, %al
        out     %al, $0x40
        xor     %ebp, %ebp
        sti
3:      hlt
        test    %ebp, %ebp
        jz      3b
        cli
        step    'i'

        mov     $WORK, %ecx
4:      dec     %ecx
        jnz     4b
        step    'w'
        mov     $85, %al
        jmp     end
exception:
        step    '!'
        mov     $1, %al
end:    out     %al, $0xf4
5:      cli
        hlt
        jmp     5b

interrupt:
        inc     %ebp
        movl    $0, 0xb0(%rbx)
        push    %rax
        mov     $0x20, %al
        out     %al, $0x20
        pop     %rax
        iretq

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff
        .quad   0x00cf93000000ffff
        .quad   0x00af9b000000ffff
gdtr:   .word   . - gdt - 1
        .long   gdt
idtr:   .word   34 * 16 - 1
        .quad   IDT
