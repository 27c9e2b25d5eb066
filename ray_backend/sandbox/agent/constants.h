/* Made from constants.py; write it anew with
   python -m ray_backend.sandbox.agent.constants */
#ifndef APOTHIC_CONSTANTS_H
#define APOTHIC_CONSTANTS_H

#define MAGIC_BYTES 8
#define MAGIC_VALUES 0xab, 0x41, 0x70, 0x6f, 0x74, 0x68, 0x69, 0x63
#define PROTOCOL_VERSION 1
#define NONCE_BYTES 16
#define FRAME_HEADER_BYTES 9
#define FRAME_TRAILER 90
#define FRAME_TRAILER_BYTES 1
#define FRAME_BODY_MAX 131072
#define REQUEST_MAX 8388608
#define PATH_MAX_BYTES 4095
#define BLOB_MAX 1048576
#define STREAMS_MAX 256
#define KEEPERS_MAX 1024
#define INPUT_WINDOW 262144
#define LENGTH_UNKNOWN 18446744073709551615ULL
#define STAT_BYTES 48
#define EXEC_HEAD_BYTES 20

enum {
    FRAME_HELLO = 1,
    FRAME_PART = 2,
    FRAME_EXEC = 3,
    FRAME_KILL = 4,
    FRAME_SIGNAL = 5,
    FRAME_DATA = 6,
    FRAME_END = 7,
    FRAME_CREDIT = 8,
    FRAME_CANCEL = 9,
    FRAME_STAT = 16,
    FRAME_LIST = 17,
    FRAME_READ = 18,
    FRAME_WRITE = 19,
    FRAME_MKDIR = 20,
    FRAME_REMOVE = 21,
    FRAME_RENAME = 22,
    FRAME_GET_BLOB = 23,
    FRAME_SET_BLOB = 24,
    FRAME_ENVIRON = 25,
    FRAME_WELCOME = 129,
    FRAME_STARTED = 130,
    FRAME_OUTPUT = 131,
    FRAME_EXIT = 132,
    FRAME_KILLED = 133,
    FRAME_OPENED = 134,
    FRAME_DONE = 135,
    FRAME_ERROR = 136,
    FRAME_GRANT = 137,
    FRAME_FATAL = 138,
};

enum {
    CHANNEL_STDOUT = 1,
    CHANNEL_STDERR = 2,
};

enum {
    CAPABILITY_INIT = 1,
    CAPABILITY_SWITCH_USER = 2,
};

enum {
    EXEC_STDIN = 1,
    EXEC_TELL_START = 2,
};

enum {
    KILL_DISCARD_OUTPUT = 1,
};

enum {
    WRITE_APPEND = 1,
    WRITE_MAKE_PARENTS = 2,
    WRITE_KEEP_REST = 4,
    WRITE_EXCLUSIVE = 8,
};

enum {
    MKDIR_PARENTS = 1,
    MKDIR_EXIST_OK = 2,
};

enum {
    REMOVE_DIRECTORY = 1,
};

enum {
    RENAME_NO_REPLACE = 1,
};

enum {
    STAT_NO_FOLLOW = 1,
};

enum {
    EXIT_SIGNALED = 1,
    EXIT_CORE = 2,
    EXIT_LEFT_BEHIND = 4,
    EXIT_LOST = 8,
};

enum {
    STAGE_REQUEST = 0,
    STAGE_START = 1,
    STAGE_USER = 2,
    STAGE_CWD = 3,
    STAGE_PROGRAM = 4,
    STAGE_INTERPRETER = 5,
};

#endif
