# SPDX-License-Identifier: GPL-2.0-or-later
#
# Makefile - build, test and install qemu-vp (GNU make)
#
# What ./configure found out is in config.mak, which is made with defaults where
# it is missing. What is built goes to build/, the program alone to the top.
#
#   all install uninstall   the program, README and manual page; DESTDIR and
#                           PREFIX as usual
#   install-systemd         and the host's unit, as the README has it; or
#                           -systemd-guest, -sysv, -openrc
#   check, test             every suite, some minutes (tests/check.sh)
#   check-long              the next three, the better part of an hour
#   check-chaos             the suites of damaged channels, nothing left out
#   check-sanitize          every suite, with the sanitizers, in build/sanitize
#   check-guest             in real guests, under QEMU (tests/guest)
#   check-machines          in guests of other processors, with the QEMU of other
#                           Debians, and with systemd
#   check-cross             other processors and C libraries, and POSIX alone
#                           (tests/cross)
#   demo [GUEST=1]          see it work, or see it work with a guest
#                           (for guests APT=1 allows apt-get)
#   bench                   how fast it is (tests/bench)
#   fuzz                    fuzzers, FUZZ_SECONDS each (tests/fuzz)
#   chaos [SEEDS=n]         ill-treat the channel in n random ways (tests/chaos)
#   lint                    what compilers and linters have to say
#   clean distclean         away with what was built; with all that was made
#   help                    this list

.DELETE_ON_ERROR:
.SUFFIXES:

all: qemu-vp

ifneq ($(filter-out clean distclean help,$(or $(MAKECMDGOALS),all)),)
CONFIGURE = ./configure
config.mak: configure
	$(CONFIGURE)
include config.mak
endif

INSTALL = install
export VP_TOP := $(CURDIR)
export QEMU_VP = $(VP_TOP)/qemu-vp

compile = $(CC) $(CPPFLAGS_AUTO) $(CPPFLAGS) $(CFLAGS_AUTO) $(CFLAGS)
# A static program is linked at a fixed place, as not every toolchain can do
# otherwise; where it can, LDFLAGS=-static-pie says so.
pie = $(if $(filter -static -static-pie,$(CC) $(CFLAGS) $(LDFLAGS)),,$(PIE))
link = $(CC) $(CFLAGS_AUTO) $(CFLAGS) $(LDFLAGS_AUTO) $(pie) $(LDFLAGS)

qemu-vp: build/qemu-vp.o build/virtproxy.o
	$(link) -o $@ $^ $(LDLIBS_AUTO) $(LDLIBS)

build/%.o: %.c config.mak
	@mkdir -p $(@D)
	$(compile) $(DEPFLAGS) -c -o $@ $<

# In a directory of suites every test_*.c is a program, and the other sources
# are linked into each of them; of tests/lib it gets what it uses.
suite_dirs = tests/unit tests/wire tests/daemon tests/chaos tests/rogue \
    tests/fuzz tests/calls
suites =
define suite_dir
suites += $$(patsubst %.c,build/%,$$(wildcard $(1)/test_*.c))
$$(patsubst %.c,build/%,$$(wildcard $(1)/test_*.c)): \
    $$(patsubst %.c,build/%.o,$$(filter-out $(1)/test_%,$$(wildcard $(1)/*.c)))
endef
$(foreach dir,$(suite_dirs),$(eval $(call suite_dir,$(dir))))

tests_lib = build/tests/lib.a
$(tests_lib): $(patsubst %.c,build/%.o,$(wildcard tests/lib/*.c))
	rm -f $@
	$(AR) rc $@ $^

build/tests/%.o: CPPFLAGS_AUTO += -I. $(CHECK_CFLAGS)
$(suites): build/%: build/%.o $(tests_lib)
	$(link) -o $@ $(filter %.o,$^) $(tests_lib) $(CHECK_LIBS) $(LDLIBS_AUTO) \
	    $(LDLIBS)

# The suites of damaged channels take minutes if each byte has its turn and each
# random run is run: make check does each STRIDEth byte and SEEDS of these runs.
ifeq ($(HAVE_CHECK),yes)
check: check-needs all $(suites)
	@STRIDE=$${STRIDE-7} SEEDS=$${SEEDS-500} tests/check.sh $(suites)

damage = $(filter build/tests/chaos/% build/tests/unit/test_wire,$(suites))
late = $(patsubst %,build/tests/unit/test_%,conn link loop offer session)
check-chaos: all $(damage) $(late)
	tests/check.sh $(damage)
	LATE=1 tests/check.sh $(late)

chaos: build/tests/chaos/test_chaos
	$<

check-needs:
	@tests/check.sh --needs
else
check check-chaos chaos:
	@echo 'The tests need libcheck, and configure found none for $(CC):' \
	    'install check (Debian, Ubuntu), check-devel (Fedora) or' \
	    'check-dev (Alpine), then ./configure' >&2
	@false
endif

test: check

check-long: check-chaos check-sanitize check-guest

check-sanitize:
	@mkdir -p build/sanitize
	cd build/sanitize && ../../configure --enable-sanitize
	STRIDE=41 SEEDS=250 $(MAKE) -C build/sanitize check

check-guest:
	tests/guest/run.sh

check-machines:
	tests/guest/elsewhere.sh

check-cross:
	tests/cross/run.sh

demo: all
	$(if $(GUEST),tests/guest/demo.sh,tests/demo/demo.sh)

bench: all
	tests/bench/run.sh

fuzz:
	tests/fuzz/run.sh

# The linters come with the machine, whatever CC is. Three warnings of gcc 12's
# analyzer are left out: it takes what is kept in a structure for a leak, doesn't
# see an array filled by a loop, or by another function, and counts the elements
# of a vector as its bits. .clang-tidy and .cppcheck have the others' exceptions;
# those of one source alone are here.
sources = virtproxy.c qemu-vp.c
space := $() $()
lint_flags = -std=c11 -Wall -Wextra -Wshadow -Wconversion $(CPPFLAGS_AUTO)
lint: lint-needs $(sources:%=lint-%) lint-cppcheck lint-scripts

lint-needs:
	@missing=; for name in gcc clang-tidy cppcheck shellcheck; do \
	    command -v $$name >/dev/null || missing="$$missing $$name"; \
	done; \
	[ -z "$$missing" ] || \
	    { echo "make lint needs:$$missing (Debian's names)" >&2; exit 1; }

lint-virtproxy.c: tidy = -bugprone-integer-division,\
-bugprone-sizeof-expression,-clang-analyzer-unix.Malloc
lint-qemu-vp.c: tidy = -bugprone-suspicious-memory-comparison,-cert-err34-c,\
-cert-exp42-c,-cert-flp37-c,-clang-analyzer-core.NullDereference,\
-clang-analyzer-core.NonNullParamChecker,\
-clang-analyzer-optin.portability.UnixAPI,-clang-analyzer-unix.Malloc

$(sources:%=lint-%): lint-%: %
	gcc $(lint_flags) -O2 -Werror -fanalyzer -Wno-analyzer-malloc-leak \
	    -Wno-analyzer-use-of-uninitialized-value \
	    -Wno-analyzer-shift-count-overflow -c -o /dev/null $<
	clang-tidy --quiet --checks='$(subst $(space),,$(tidy))' $< -- \
	    $(lint_flags)

lint-cppcheck: $(sources)
	cppcheck --quiet --std=c11 --enable=warning,performance,portability \
	    --suppressions-list=.cppcheck --error-exitcode=1 \
	    $(filter -D%,$(lint_flags)) $^

lint-scripts:
	shellcheck -x -P SCRIPTDIR configure .ci/run tests/*.sh tests/*/*.sh

# The manual page is the README: its sections, with what is indented as it is.
define man_page
    BEGIN { print ".TH QEMU-VP 8 2026-11-28"; blank = 1 }
    { gsub(/\\/, "\\e"); gsub(/-/, "\\-") }
    /^[.\047]/ { $$0 = "\\&" $$0 }
    /^$$/ { blank = !first; next }
    /^[A-Z][A-Z ]*$$/ && blank {
        print (text ? "" : ".fi\n") ".SH " $$0
        blank = 0; text = first = 1
        next
    }
    /^[ \\]/ {
        if (text) { print (first ? "" : ".PP\n") ".nf"; text = 0 } else if (blank) { print "" }
    }
    /^[^ \\]/ && (blank || !text) { print (text ? "" : ".fi\n") ".PP"; text = 1 }
    { print; blank = first = 0 }
    END { if (!text) { print ".fi" } }
endef
export man_page

build/qemu-vp.8: README Makefile config.mak
	@mkdir -p $(@D)
	awk "$$man_page" README >$@

install: all build/qemu-vp.8
	$(INSTALL) -d '$(DESTDIR)$(bindir)' '$(DESTDIR)$(docdir)' \
	    '$(DESTDIR)$(mandir)/man8'
	$(INSTALL) -m 755 qemu-vp '$(DESTDIR)$(bindir)/qemu-vp'
	$(INSTALL) -m 644 README '$(DESTDIR)$(docdir)/README'
	$(INSTALL) -m 644 build/qemu-vp.8 '$(DESTDIR)$(mandir)/man8/qemu-vp.8'

uninstall:
	rm -f '$(DESTDIR)$(bindir)/qemu-vp' '$(DESTDIR)$(docdir)/README' \
	    '$(DESTDIR)$(mandir)/man8/qemu-vp.8'
	rmdir '$(DESTDIR)$(docdir)' 2>/dev/null || :

# $(call recipe,HEADING,FILE,MODE) installs the FILE that the README has under
# the line that begins with HEADING.
define recipe
$(INSTALL) -d '$(DESTDIR)$(dir $(2))'
awk -v head='$(1)' -v file='  $(2)' ' \
    !found { found = index($$0, head) == 1; next } \
    !named { named = $$0 == file; next } \
    /^    / { for (; n > 0; n--) print ""; print substr($$0, 5); next } \
    /^$$/ { n++; next } \
    { exit } \
' README | sed 's,/usr/local/bin,$(bindir),' >'$(DESTDIR)$(2)'
chmod $(3) '$(DESTDIR)$(2)'
endef

install-systemd: install
	$(INSTALL) -d '$(DESTDIR)/etc/qemu-vp'
	$(call recipe,systemd$(comma) host;,/etc/systemd/system/qemu-vp@.service,644)

install-systemd-guest: install
	$(call recipe,systemd$(comma) guest;,/etc/udev/rules.d/90-qemu-vp.rules,644)
	$(call recipe,systemd$(comma) guest;,/etc/systemd/system/qemu-vp-guest.service,644)

install-sysv: install
	$(call recipe,SysV:,/etc/init.d/qemu-vp,755)

install-openrc: install
	$(call recipe,OpenRC:,/etc/init.d/qemu-vp,755)

comma = ,

clean:
	rm -rf build qemu-vp

distclean: clean
	rm -rf config.mak tests/guest/cache

help:
	@sed -n '/^#   /s/^#  //p' Makefile

.PHONY: all check test check-needs check-long check-chaos check-sanitize \
    check-guest check-machines check-cross demo bench fuzz chaos lint \
    lint-needs $(sources:%=lint-%) \
    lint-cppcheck lint-scripts install uninstall install-systemd \
    install-systemd-guest install-sysv install-openrc clean distclean help

-include $(wildcard build/*.d build/tests/*/*.d)
