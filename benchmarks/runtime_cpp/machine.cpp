// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include <fstream>

std::string processor() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);)
        if (line.rfind("model name", 0) == 0) return line.substr(line.find(": ") + 2);
    return "unknown";
}

int cores() { return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)); }

std::string utc_time() {
    const time_t now = time(nullptr);
    tm fields;
    gmtime_r(&now, &fields);
    char text[32];
    strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S+00:00", &fields);
    return text;
}

std::string git_commit() {
    FILE* const git =
        popen("git -C '" XSHARE_ROOT "' describe --always --exclude '*' --dirty=+ 2>/dev/null", "r");
    if (git == nullptr) return "";
    char text[64] = "";
    const bool has_text = fgets(text, sizeof text, git) != nullptr;
    std::string commit = pclose(git) == 0 && has_text ? text : "";
    while (!commit.empty() && commit.back() == '\n') commit.pop_back();
    return commit;
}
