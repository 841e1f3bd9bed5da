import type { Codec, Fields, StructValue } from './codec.js';
import { struct } from './codec.js';
import type { Authorized, Entity } from './entity.js';

/** Names of the handle area in order; `!` marks those that need an authorisation (`@` in Part 3's tables). */
export type HandleNames = readonly string[];

/** What the caller gives for each handle: a forgotten one, or one without authorisation, does not compile. */
export type HandleArguments<H extends HandleNames> = {
  readonly [N in H[number] as N extends `!${infer Rest}` ? Rest : N]: N extends `!${string}`
    ? Authorized
    : Entity;
};

/** The entities alone, for hashes over Names. */
export type HandleEntities<H extends HandleNames> = {
  readonly [N in H[number] as N extends `!${infer Rest}` ? Rest : N]: Pick<Entity, 'name'>;
};

/** What a policy command does to how a later use of the session is authorised. */
export type PolicyEffect = 'auth-value' | 'password' | 'restart';

/** One TPM command: everything that the pipeline has to know of it. */
export interface Command<H extends HandleNames, P, R> {
  /** Without the prefix `TPM2_`. */
  readonly name: string;
  readonly code: number;
  readonly handles: H;
  readonly params: Codec<P>;
  readonly resultHandles: readonly string[];
  readonly result: Codec<unknown>;
  /** The first parameter is sized, so a session can encrypt it. */
  readonly encryptable: { readonly in: boolean; readonly out: boolean };
  /** What success does to the session in the handle area named `policySession`. */
  readonly policyEffect: PolicyEffect | undefined;
  /**
   * The authValue of the first handle after success, where the command changes it: the HMAC of the answer is made with
   * that one. undefined where it stays.
   */
  newAuth(params: P, first: Entity | undefined): Uint8Array | undefined;
  /** Only for the type of the result. */
  readonly resultType?: R;
}

/** What a command's line in Part 3's tables says. */
export interface CommandDeclaration<
  H extends HandleNames,
  P extends Fields,
  O extends readonly string[],
  R extends Fields,
> {
  readonly code: number;
  readonly handles?: H;
  readonly params?: P;
  readonly resultHandles?: O;
  readonly result?: R;
  readonly policyEffect?: PolicyEffect;
  newAuth?(params: StructValue<P>, first: Entity | undefined): Uint8Array | undefined;
}

/** Declares a command. Chapter files hold nothing but calls of this. */
export function command<
  const H extends HandleNames = readonly [],
  P extends Fields = Record<never, never>,
  const O extends readonly string[] = readonly [],
  R extends Fields = Record<never, never>,
>(
  name: string,
  declaration: CommandDeclaration<H, P, O, R>,
): Command<H, StructValue<P>, { readonly [K in O[number]]: number } & StructValue<R>> {
  const params = declaration.params ?? ({} as P);
  const result = declaration.result ?? ({} as R);
  const startsSized = (fields: Fields) => Object.values(fields)[0]?.sized === true;
  return {
    name,
    code: declaration.code,
    handles: declaration.handles ?? ([] as readonly string[] as H),
    params: struct(params),
    resultHandles: declaration.resultHandles ?? [],
    result: struct(result),
    encryptable: { in: startsSized(params), out: startsSized(result) },
    policyEffect: declaration.policyEffect,
    newAuth: declaration.newAuth ?? (() => undefined),
  };
}
