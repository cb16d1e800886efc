/* What GCC's unwinder (libgcc_eh) misses when it is linked statically to musl instead of glibc.
 *
 * Compiled with glibc's headers on purpose: libgcc_eh was, so the layout of the result is the one it reads. The only
 * function called is dl_iterate_phdr, whose interface musl took over unchanged. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>

/* libgcc_eh calls these, but refers to them weakly, and a weak reference takes no member out of libc.a: the unwinder would
 * call address 0. These references are not weak. */
__attribute__((used)) static void *const taken_from_libc[] = {
    (void *)pthread_once,
    (void *)pthread_mutex_lock,
    (void *)pthread_mutex_unlock,
};

/* In glibc since 2.35, for libgcc_eh alone; GCC before 12 calls dl_iterate_phdr itself. */
#ifdef DLFO_EH_SEGMENT_TYPE
struct query {
    uintptr_t address;
    struct dl_find_object *result;
};

static int look_into(struct dl_phdr_info *object, size_t size, void *data) {
    struct query *query = data;
    const ElfW(Phdr) *holds = 0, *unwind = 0;
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr) *header = &object->dlpi_phdr[i];
        uintptr_t start = object->dlpi_addr + header->p_vaddr;
        if (header->p_type == PT_LOAD && query->address - start < header->p_memsz)
            holds = header;
        else if (header->p_type == DLFO_EH_SEGMENT_TYPE)
            unwind = header;
    }
    (void)size;
    if (!holds || !unwind)
        return 0;
    *query->result = (struct dl_find_object){
        .dlfo_map_start = (void *)(object->dlpi_addr + holds->p_vaddr),
        .dlfo_map_end = (void *)(object->dlpi_addr + holds->p_vaddr + holds->p_memsz),
        .dlfo_eh_frame = (void *)(object->dlpi_addr + unwind->p_vaddr),
    };
    return 1;
}

int _dl_find_object(void *address, struct dl_find_object *result) {
    struct query query = {(uintptr_t)address, result};
    return dl_iterate_phdr(look_into, &query) ? 0 : -1;
}
#endif
